"""Abstract parameters of a module."""

import functools

import flax.linen as nn
import jax


@functools.lru_cache
def abstract_params(module: nn.Module):
    """The parameter tree of a tokenizer or transformer, boxed with logical axes; nothing is allocated.

    Kept: tracing the initialisation takes a second or two. The tree is not to be changed.
    """
    return jax.eval_shape(module.init_params, jax.random.key(0))
