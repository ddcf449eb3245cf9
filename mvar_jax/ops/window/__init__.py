"""2-D local-window attention (MVAR section 3.3, spatial-Markov; clamped windows): one dispatch, several forms."""

import jax

from mvar_jax.errors import InputError
from mvar_jax.ops.window import gather, reference
from mvar_jax.scales import check_window

BACKENDS = {"reference": reference.attend, "gather": gather.attend}


def choose_backend(height: int, width: int, kernel_size: int) -> str:
    """`auto`: on maps of up to 256 tokens a masked product beats the gather on CPU, GPU and TPU alike."""
    covers_map = kernel_size >= height and kernel_size >= width
    return "reference" if covers_map or height * width <= 256 else "gather"


def local_window_attention(
    q_BYXHK: jax.Array,
    k_BYXHK: jax.Array,
    v_BYXHK: jax.Array,
    window: int,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> jax.Array:
    """Each query at (i, j) attends to the W x W keys whose rows start at clip(i - W//2, 0, Y - W), columns alike.

    q, k, v: [B, Y, X, H, K] of one dtype; output the same shape and dtype, softmax in float32. A window
    larger than the map is cut to the map. Differentiable; works under jit, vmap and sharded batch or heads.

    Raises InputError for an even window, unequal shapes or dtypes, an unknown backend.
    """
    check_window(window)
    for name, x in (("k", k_BYXHK), ("v", v_BYXHK)):
        if x.shape != q_BYXHK.shape or x.dtype != q_BYXHK.dtype:
            raise InputError(name, f"{x.dtype}{x.shape}", f"q's shape and dtype, {q_BYXHK.dtype}{q_BYXHK.shape}")
    Y, X = q_BYXHK.shape[1:3]
    name = choose_backend(Y, X, window) if backend == "auto" else backend
    if name not in BACKENDS:
        raise InputError("window_backend", backend, f"auto or one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name](q_BYXHK, k_BYXHK, v_BYXHK, window, scale)
