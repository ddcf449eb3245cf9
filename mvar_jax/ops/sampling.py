"""From logits to codes: guidance ramp, top-k, top-p, draw, and the Gumbel average (VAR section 4; MVAR appendix)."""

import math

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError

REMOVED = -jnp.inf


def check_sampling_options(cfg: float, top_k: int, top_p: float, temperature: float = 1.0) -> None:
    """Raises InputError for a negative guidance or top_k, a top_p outside [0, 1], a temperature not above 0."""
    if not cfg >= 0:
        raise InputError("cfg", cfg, "a guidance of 0 or more")
    if top_k < 0:
        raise InputError("top_k", top_k, "0 (off) or more")
    if not 0 <= top_p <= 1:
        raise InputError("top_p", top_p, "0 (off) to 1")
    if not 0 < temperature < math.inf:
        raise InputError("temperature", temperature, "a number above 0 (1: as the model says)")


def guidance_strength(cfg: float, scale: int, num_scales: int) -> float:
    """t = cfg * l / (S - 1): guidance grows from nothing at the coarsest scale."""
    return cfg * scale / max(num_scales - 1, 1)


def guide(cond_BNV: jax.Array, uncond_BNV: jax.Array, strength: float) -> jax.Array:
    """(1 + t) * cond - t * uncond, float32."""
    return (1 + strength) * cond_BNV - strength * uncond_BNV


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def largest_number(is_true, shape: tuple[int, ...], num_bits: int = 32) -> jax.Array:
    """The largest uint32 below 2^num_bits of which `is_true` holds, found bit by bit.

    `is_true` holds of 0 and up to some number, and not beyond.
    """

    def set_bit(i, found):
        larger = found | (jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32))
        return jnp.where(is_true(larger), larger, found)

    return jax.lax.fori_loop(0, num_bits, set_bit, jnp.zeros(shape, jnp.uint32))


def filter_top_k(logits_V: jax.Array, top_k: int) -> jax.Array:
    """Removes all below the k-th largest (ties with it stay); 0 is off, k > V means V. Any leading axes."""
    if top_k == 0 or top_k >= logits_V.shape[-1]:
        return logits_V
    bits_V = ordered_bits(logits_V)
    count = lambda least: jnp.sum(bits_V >= least, axis=-1, keepdims=True)
    kth = largest_number(lambda least: count(least) >= top_k, (*logits_V.shape[:-1], 1))
    return jnp.where(bits_V < kth, REMOVED, logits_V)


def filter_top_p(logits_V: jax.Array, top_p: float) -> jax.Array:
    """Goes up from the smallest and removes what has cumulative probability (own included) <= 1 - p, never the last.

    Of equal logits the first come first. No sort: the value at which to stop is found by bisection of its bits,
    then the place among its equals.
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
    """Top-k, then top-p on what is left."""
    return filter_top_p(filter_top_k(logits_V, top_k), top_p)


def draw(logits_BNV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Categorical ids int32 [B, N], one key per sample: a sample's draw does not depend on its batch."""
    return jnp.argmax(logits_BNV + gumbel_noise(logits_BNV, keys_B), axis=-1).astype(jnp.int32)


def gumbel_noise(logits_BNV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Standard Gumbel noise like the logits, one key per sample."""
    return jax.vmap(lambda key: jax.random.gumbel(key, logits_BNV.shape[1:], jnp.float32))(keys_B)


def smooth_codes(
    logits_BNV: jax.Array, noise_BNV: jax.Array, codebook_Vc: jax.Array, scale: int, num_scales: int
) -> jax.Array:
    """`smooth` mode: softmax((logits * (1 + r) + noise) / tau) @ codebook, [B, N, c]; r = l / (S - 1)."""
    ratio = scale / max(num_scales - 1, 1)
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = jax.nn.softmax((logits_BNV * (1 + ratio) + noise_BNV) / tau, axis=-1)
    return jnp.einsum("bnv,vc->bnc", weights, codebook_Vc, precision=jax.lax.Precision.HIGHEST)
