"""Random keys of samples."""

import functools

import jax
import jax.numpy as jnp


def keys_of_samples(seed: int, index_B) -> jax.Array:
    """Return one key per sample, a function of (seed, sample index) alone: not of batch, order or device.

    index_B: integers [B], taken as uint32: the sample's number in a draw, or its place in the training stream.
    """
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(index_B, jnp.uint32))
