"""Initial values of parameters, and abstract parameters of a module."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LINEN_FIELDS = ("name", "parent")  # that flax adds to those of a module


def normal(std: float, factors: np.ndarray | float = 1.0):
    """Return an initializer: a normal of this std, truncated at -2 and 2, times constant factors."""

    def init(key, shape, dtype=jnp.float32):
        x = jax.random.truncated_normal(key, -2 / std, 2 / std, shape, jnp.float32) * std
        return (x * factors).astype(dtype)

    return init


@functools.lru_cache
def abstract_params(module: nn.Module):
    """Return the parameter tree of a tokenizer or transformer, boxed with logical axes; nothing is allocated.

    Cached, since tracing the initialization takes a second or two; callers must not change the tree.
    """
    return jax.eval_shape(module.init_params, jax.random.key(0))
