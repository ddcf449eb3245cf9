"""A tokenizer and a transformer with their weights."""

import functools

import jax

from mvar_jax.models.tokenizer import Tokenizer


@functools.partial(jax.jit, static_argnames=("tokenizer", "method"))
def apply_tokenizer(tokenizer: Tokenizer, params, x: jax.Array, method: str) -> jax.Array:
    """A method of the tokenizer, compiled once for all its callers."""
    return tokenizer.apply({"params": params}, x, method=method)
