"""The oracle: dense attention with the window's mask, by the plain formula. O(N^2) memory."""

import jax
import jax.numpy as jnp

from mvar_jax.ops.attention import MASKED
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.window.geometry import window_mask


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by masking; see `local_window_attention`."""
    B, Y, X, H, K = q_BYXHK.shape
    q, k, v = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
    precision = precision_of("attention", q.dtype)
    logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    logits += jnp.where(jnp.asarray(window_mask(Y, X, kernel_size)), 0.0, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, v, precision=precision).reshape(q_BYXHK.shape)
