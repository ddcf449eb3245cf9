"""Logits to codes: guidance ramp, top-k, top-p, categorical draw, Gumbel average (docs/method.md, Sampling)."""

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.precision import precision_of

REMOVED = -jnp.inf


def guidance_strength(cfg, scale: int, num_scales: int):
    """Return t = cfg * l / (S - 1), a number or an array as cfg: guidance grows from 0 at the coarsest scale."""
    return cfg * scale / max(num_scales - 1, 1)


def guide(cond: jax.Array, uncond: jax.Array, strength: jax.Array | float) -> jax.Array:
    """Return (1 + t) * cond - t * uncond of logits, or of what they are a linear function of."""
    return (1 + strength) * cond - strength * uncond


def ordered_bits(x: jax.Array) -> jax.Array:
    """Map float32 values to uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = np.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def largest_number(is_true, shape: tuple[int, ...], num_bits: int = 32) -> jax.Array:
    """Return the largest uint32 below 2^num_bits for which `is_true` holds, found bit by bit.

    `is_true` must hold for every number from 0 to the result and for none above it.
    """

    def set_bit(i, found):
        larger = found | (np.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32))
        return jnp.where(is_true(larger), larger, found)

    return jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros(shape, jnp.uint32))


def filter_top_k(logits_V: jax.Array, top_k: int) -> jax.Array:
    """Remove logits below the k-th largest, keeping ties with it; 0 or k >= V removes none. Any leading axes."""
    if top_k == 0 or top_k >= logits_V.shape[-1]:
        return logits_V
    bits_V = ordered_bits(logits_V)
    count = lambda least: jnp.sum(bits_V >= least, axis=-1, keepdims=True)
    kth = largest_number(lambda least: count(least) >= top_k, (*logits_V.shape[:-1], 1))
    return jnp.where(bits_V < kth, REMOVED, logits_V)


def filter_top_p(logits_V: jax.Array, top_p: float) -> jax.Array:
    """Remove logits, in ascending order, if the probability up to and including theirs is <= 1 - p; keep the largest.

    Equal logits are taken by index. Without a sort: bisection over the bits finds the value at which to stop, then
    the place among equal values.
    """
    if top_p == 0:
        return logits_V
    add = lambda x_V: jnp.sum(x_V, axis=-1, keepdims=True)
    shape, V = (*logits_V.shape[:-1], 1), logits_V.shape[-1]
    bits_V, probability_V = ordered_bits(logits_V), jax.nn.softmax(logits_V, axis=-1)
    largest = jnp.max(bits_V, axis=-1, keepdims=True)
    mass_below = lambda bits: add(jnp.where(bits_V < bits, probability_V, 0))
    stop = jnp.minimum(largest_number(lambda bits: mass_below(bits) <= 1 - top_p, shape), largest)

    place_V, is_equal_V = jnp.arange(V, dtype=jnp.uint32), bits_V == stop
    left = 1 - top_p - mass_below(stop)
    each = jnp.max(jnp.where(is_equal_V, probability_V, 0), axis=-1, keepdims=True)
    num_equal = lambda place: add(is_equal_V & (place_V < place))
    stop_place = largest_number(lambda place: num_equal(place) * each <= left, shape, V.bit_length())
    last_place = jnp.max(jnp.where(bits_V == largest, place_V, 0), axis=-1, keepdims=True)
    is_removed = (bits_V < stop) | (is_equal_V & (place_V < stop_place) & (place_V != last_place))
    return jnp.where(is_removed, REMOVED, logits_V)


def filter_logits(logits_V: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Apply top-k, then top-p to the remaining logits."""
    return filter_top_p(filter_top_k(logits_V, top_k), top_p)


def draw(logits_BNV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draw categorical ids `[B, N] int32`; one key per sample, so that a draw does not depend on its batch."""
    return jnp.argmax(logits_BNV + gumbel_noise(logits_BNV, keys_B), axis=-1).astype(jnp.int32)


def gumbel_noise(logits_BNV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Return standard Gumbel noise of the logits' shape, one key per sample."""
    return jax.vmap(lambda key: jax.random.gumbel(key, logits_BNV.shape[1:], jnp.float32))(keys_B)


def smooth_weights(logits_BNV: jax.Array, noise_BNV: jax.Array, scale: int, num_scales: int) -> jax.Array:
    """Return softmax((logits * (1 + r) + noise) / tau), the shares of the codes; r = l / (S - 1)."""
    ratio = scale / max(num_scales - 1, 1)
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return jax.nn.softmax((logits_BNV * (1 + ratio) + noise_BNV) / tau, axis=-1)


def mix_codes(weights_BNV: jax.Array, codebook_Vc: jax.Array) -> jax.Array:
    """Return weights @ codebook, `[B, N, c]`."""
    return jnp.einsum("bnv,vc->bnc", weights_BNV, codebook_Vc, precision=precision_of("mixtures", jnp.float32))
