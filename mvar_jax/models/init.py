"""Parameters of a module: initialisation and abstract shapes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.models.transformer import Transformer


@functools.lru_cache
def abstract_params(module: nn.Module):
    """The parameter tree of a tokenizer or transformer, boxed with logical axes; nothing is allocated.

    Kept: tracing the initialisation takes a second or two. The tree is not to be changed.
    """
    return jax.eval_shape(initializer(module), jax.random.key(0))


def initializer(module: nn.Module):
    """key -> boxed parameters."""
    if isinstance(module, Transformer):
        return module.init_params
    image = jnp.zeros((1, module.image_size, module.image_size, 3))
    return lambda key: module.init(key, image)["params"]
