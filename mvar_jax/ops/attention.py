"""Dense attention and its two masks: block-diagonal (scale-Markov) and block-causal (VAR)."""

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.precision import precision_of

MASKED = -1e30  # finite, so that a fully masked row gives no NaN


def dense_attention(
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    mask_NM: np.ndarray | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Return softmax(scale * q k^T + mask) v, `[B, N, H, K]` in v's dtype; logits and softmax are float32."""
    q_BHNK, k_BHMK, v_BHMK = (x.swapaxes(1, 2) for x in (q_BNHK, k_BMHK, v_BMHK))
    mask = True if mask_NM is None else jnp.asarray(mask_NM)
    return softmax_attention(q_BHNK, k_BHMK, v_BHMK, mask, scale).swapaxes(1, 2)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask, scale: float) -> jax.Array:
    """Return the same for q `[..., N, K]`, k and v `[..., M, K]`; mask broadcasts to `[..., N, M]`.

    Divides by the softmax's sum last: K divisions per query instead of M, up to twice as fast on a CPU.
    """
    options = {"preferred_element_type": jnp.float32, "precision": precision_of("attention", q.dtype)}
    logits = jnp.einsum("...nk,...mk->...nm", q, k, **options) * scale
    if mask is not True:
        logits = jnp.where(mask, logits, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.einsum("...nm,...mk->...nk", weights.astype(v.dtype), v, **options)
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


def block_diagonal_mask(areas: tuple[int, ...]) -> np.ndarray:
    """Return `[N, N] bool`: true if query and key belong to the same scale."""
    level = np.repeat(np.arange(len(areas)), areas)
    return level[:, None] == level[None, :]


def block_causal_mask(areas: tuple[int, ...]) -> np.ndarray:
    """Return `[N, N] bool`: true if the key's scale is not finer than the query's."""
    level = np.repeat(np.arange(len(areas)), areas)
    return level[:, None] >= level[None, :]


def normalise_query_key(q: jax.Array, k: jax.Array, log_scale_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L2-normalise q and k per head and multiply q by exp(min(log_scale, log 100)), in float32.

    See docs/method.md, Attention.
    """
    dtype = q.dtype
    return (unit_norm(q) * head_scale(log_scale_H)[:, None]).astype(dtype), unit_norm(k).astype(dtype)


def head_scale(log_scale_H: jax.Array) -> jax.Array:
    """Return the factor of each head's normalised queries, float32."""
    return jnp.exp(jnp.minimum(log_scale_H.astype(jnp.float32), np.log(100.0)))


def unit_norm(x: jax.Array) -> jax.Array:
    """Return x / max(|x|, 1e-12) over the last axis, in float32; its gradient at zero is finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def unit_norm_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient of x, float32, from that of unit_norm(x); autodiff's takes more registers in a kernel."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    along = jnp.sum(x * gradient, axis=-1, keepdims=True) * jnp.square(inverse)
    return inverse * (gradient - x * jnp.where(square > 1e-24, along, 0.0))
