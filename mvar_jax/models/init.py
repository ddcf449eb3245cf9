"""Abstract parameters of a module."""

import functools

import flax.linen as nn
import jax

LINEN_FIELDS = ("name", "parent")  # that flax adds to those of a module


@functools.lru_cache
def abstract_params(module: nn.Module):
    """Return the parameter tree of a tokenizer or transformer, boxed with logical axes; nothing is allocated.

    Cached, since tracing the initialization takes a second or two; callers must not change the tree.
    """
    return jax.eval_shape(module.init_params, jax.random.key(0))
