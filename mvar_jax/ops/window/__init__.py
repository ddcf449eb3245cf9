"""2-D local-window attention (MVAR section 3.3, spatial-Markov; clamped windows): one dispatch, several forms.

| backend    | form                                                        | memory beyond q, k, v, out  |
| ---------- | ----------------------------------------------------------- | --------------------------- |
| reference  | masked attention over the whole map, the oracle             | O(N^2)                      |
| dense      | the same in cuDNN where that takes it                       | O(N^2), on CUDA O(N)        |
| gather     | the paper's: every query's keys gathered                    | O(N W^2 K)                  |
| tiled      | small square tiles of queries against their halo of keys    | O(N (W + t)^2) a few heads  |
| band       | bands of whole rows against their halo                      | O(N (W + t) X) a few heads  |
| pallas_gpu | Triton kernels, forward and backward                        | O(N)                        |
| pallas_tpu | splash attention with the windows as block-sparse mask      | O(N)                        |
"""

import functools
import logging

import jax

from mvar_jax.errors import InputError
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.window import dense, gather, pallas_gpu, pallas_tpu, reference, tiled
from mvar_jax.scales import check_window

BACKENDS = {
    "reference": reference.attend,
    "dense": dense.attend,
    "gather": gather.attend,
    "tiled": tiled.attend,
    "band": tiled.attend_bands,
    "pallas_gpu": pallas_gpu.attend,
    "pallas_tpu": pallas_tpu.attend,
}

# the one platform that a backend runs on, and its own reason to refuse
KERNELS = {"pallas_gpu": ("gpu", pallas_gpu.why_not), "pallas_tpu": ("tpu", pallas_tpu.why_not)}

logger = logging.getLogger(__name__)


def why_not(backend: str, q_BYXHK: jax.Array) -> str | None:
    """The reason that a backend cannot take q on the current platform, None where it can."""
    if backend not in KERNELS:
        return None
    home, refuses = KERNELS[backend]
    platform = current_platform()
    if platform != home:
        return f"it runs on {home}, this is {platform}"
    return refuses(q_BYXHK)


def choose_backend(q_BYXHK: jax.Array, kernel_size: int) -> str:
    """`auto`, from the measurements in benchmarks/RESULTS.md.

    A window that covers the map is plain attention everywhere. CPU: one masked product on small maps and where
    bands would not spare half of it, else bands, and tiles on large maps. GPU: the kernel on every map, and
    where that cannot run as on CPU. TPU: dense up to 32 x 32, whose masked product the matrix unit does faster
    than anything finer, splash beyond. CPU is measured; GPU and TPU follow from compiled figures and rooflines,
    no kernel has run there yet.
    """
    Y, X = q_BYXHK.shape[1:3]
    platform = current_platform()
    if kernel_size >= Y and kernel_size >= X:
        return "dense"
    if platform == "tpu":
        return "dense" if Y * X <= 1024 or why_not("pallas_tpu", q_BYXHK) else "pallas_tpu"
    if platform == "gpu" and not why_not("pallas_gpu", q_BYXHK):
        return "pallas_gpu"
    if Y * X > 576:
        return "tiled"
    return "dense" if Y * X <= 100 or tiled.BAND_ROWS + kernel_size - 1 > Y / 2 else "band"


@functools.cache
def log_once(message: str) -> None:
    logger.info(message)


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

    q, k, v: [B, Y, X, H, K] of one dtype; output the same shape and dtype, logits and softmax in float32. A
    window larger than the map is cut to the map. backend: see the table above, "auto" for `choose_backend`.
    Differentiable; works under jit, vmap, shard_map and with batch or heads sharded, without communication.

    Raises InputError for an even window, unequal shapes or dtypes, an unknown backend, or a backend that cannot
    run here or on these arrays.
    """
    check_window(window, "window")
    for name, x in (("k", k_BYXHK), ("v", v_BYXHK)):
        if x.shape != q_BYXHK.shape or x.dtype != q_BYXHK.dtype:
            raise InputError(name, f"{x.dtype}{x.shape}", f"q's shape and dtype, {q_BYXHK.dtype}{q_BYXHK.shape}")
    if q_BYXHK.ndim != 5:
        raise InputError("q", f"shape {q_BYXHK.shape}", "five axes: batch, rows, columns, heads, head width")
    name = choose_backend(q_BYXHK, window) if backend == "auto" else backend
    if name not in BACKENDS:
        raise InputError("window_backend", backend, f"auto or one of {', '.join(sorted(BACKENDS))}")
    if reason := why_not(name, q_BYXHK):
        able = [other for other in BACKENDS if not why_not(other, q_BYXHK)]
        raise InputError("window_backend", f"{name} ({reason})", f"auto or one of {', '.join(able)}")
    if backend == "auto":
        Y, X = q_BYXHK.shape[1:3]
        log_once(f"local window {window} on {Y} x {X}, {q_BYXHK.dtype}, {current_platform()}: {name}")
    return BACKENDS[name](q_BYXHK, k_BYXHK, v_BYXHK, window, scale)
