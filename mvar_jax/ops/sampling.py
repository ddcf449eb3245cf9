"""From logits to codes: guidance ramp, top-k, top-p, draw, and the Gumbel average (VAR section 4; MVAR appendix)."""

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError

REMOVED = -jnp.inf


def check_sampling_options(cfg: float, top_k: int, top_p: float) -> None:
    """Raises InputError for a negative guidance or top_k, or a top_p outside [0, 1]."""
    if not cfg >= 0:
        raise InputError("cfg", cfg, "a guidance of 0 or more")
    if top_k < 0:
        raise InputError("top_k", top_k, "0 (off) or more")
    if not 0 <= top_p <= 1:
        raise InputError("top_p", top_p, "0 (off) to 1")


def guidance_strength(cfg: float, scale: int, num_scales: int) -> float:
    """t = cfg * l / (S - 1): guidance grows from nothing at the coarsest scale."""
    return cfg * scale / max(num_scales - 1, 1)


def guide(cond_BNV: jax.Array, uncond_BNV: jax.Array, strength: float) -> jax.Array:
    """(1 + t) * cond - t * uncond, float32."""
    return (1 + strength) * cond_BNV - strength * uncond_BNV


def filter_top_k(logits_V: jax.Array, top_k: int) -> jax.Array:
    """Removes all below the k-th largest (ties with it stay); 0 is off, k > V means V. Any leading axes."""
    if top_k == 0 or top_k >= logits_V.shape[-1]:
        return logits_V
    kth = jax.lax.top_k(logits_V, top_k)[0][..., -1:]
    return jnp.where(logits_V < kth, REMOVED, logits_V)


def filter_top_p(logits_V: jax.Array, top_p: float) -> jax.Array:
    """Sorts ascending and removes what has cumulative probability (own included) <= 1 - p, never the last."""
    if top_p == 0:
        return logits_V
    order = jnp.argsort(logits_V, axis=-1)
    ascending = jnp.take_along_axis(logits_V, order, axis=-1)
    is_removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    is_removed = is_removed.at[..., -1].set(False)
    is_removed = jnp.take_along_axis(is_removed, jnp.argsort(order, axis=-1), axis=-1)
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
