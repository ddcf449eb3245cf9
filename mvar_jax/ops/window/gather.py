"""The paper's form: gather the k x k keys and values of each query, then attend. O(N k^2) work and memory."""

import jax
import jax.numpy as jnp

from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.window.geometry import window_indices


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by gathering; see `local_window_attention`."""
    B, Y, X, H, K = q_BYXHK.shape
    index_NW = jnp.asarray(window_indices(Y, X, kernel_size))
    q = q_BYXHK.reshape(B, Y * X, H, K)
    k, v = (x.reshape(B, Y * X, H, K)[:, index_NW] for x in (k_BYXHK, v_BYXHK))
    precision = precision_of("attention", q.dtype)
    logits = jnp.einsum("bnhk,bnwhk->bnhw", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnhw,bnwhk->bnhk", weights, v, precision=precision).reshape(q_BYXHK.shape)
