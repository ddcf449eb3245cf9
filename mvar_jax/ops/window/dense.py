"""Masked attention over the whole map. O(N^2) work and memory."""

import jax

from mvar_jax.ops.attention import dense_attention
from mvar_jax.ops.window.geometry import window_mask


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by masking; see `local_window_attention`."""
    B, Y, X, H, K = q_BYXHK.shape
    q, k, v = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
    return dense_attention(q, k, v, window_mask(Y, X, kernel_size), scale).reshape(q_BYXHK.shape)
