"""Masked attention over the whole map, by cuDNN's fused kernel if it supports the arrays. O(N^2) work."""

import jax
import jax.numpy as jnp

from mvar_jax.ops.attention import dense_attention
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.window.geometry import window_mask

CUDNN_BLOCK = 64  # cuDNN computes gradients for multiples of this length
CUDNN_MAX_WIDTH = 128


def is_fused(q_BYXHK: jax.Array) -> bool:
    """Return whether cuDNN supports q: half precision on CUDA, head width a multiple of 8 up to 128."""
    K = q_BYXHK.shape[-1]
    is_half = q_BYXHK.dtype in (jnp.bfloat16, jnp.float16)
    return current_platform() == "gpu" and is_half and K % 8 == 0 and K <= CUDNN_MAX_WIDTH


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by masking; see `local_window_attention`."""
    B, Y, X, H, K = q_BYXHK.shape
    if not is_fused(q_BYXHK):
        q, k, v = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
        return dense_attention(q, k, v, window_mask(Y, X, kernel_size), scale).reshape(q_BYXHK.shape)
    N, padding = Y * X, -Y * X % CUDNN_BLOCK
    pad = lambda x: jnp.pad(x.reshape(B, N, H, K), ((0, 0), (0, padding), (0, 0), (0, 0)))
    # padded queries see every key, so that no row is empty; their outputs are cut off
    mask = jnp.pad(jnp.asarray(window_mask(Y, X, kernel_size)), ((0, 0), (0, padding)))
    mask = jnp.pad(mask, ((0, padding), (0, 0)), constant_values=True)
    q, k, v = map(pad, (q_BYXHK, k_BYXHK, v_BYXHK))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], scale=scale, implementation="cudnn")
    return out[:, :N].reshape(q_BYXHK.shape)
