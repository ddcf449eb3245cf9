"""2-D local-window attention with clamped windows (MVAR section 3.3, spatial-Markov): one op, several backends.

| backend    | form                                                        | memory beyond q, k, v, out  |
| ---------- | ----------------------------------------------------------- | --------------------------- |
| reference  | masked attention over the whole map, the oracle             | O(N^2)                      |
| dense      | the same, normalised last: fewer divisions                  | O(N^2)                      |
| gather     | the paper's: each query's keys gathered                     | O(N W^2 K)                  |
| tiled      | small square tiles of queries against their halo of keys    | O(N (W + t)^2), some heads  |
| band       | bands of whole rows against their halo                      | O(N (W + t) X), some heads  |
| pallas_gpu | Triton kernels, forward and backward                        | O(N)                        |
| pallas_tpu | splash attention with the windows as block-sparse mask      | O(N)                        |
"""

import functools
import importlib
import logging
from collections.abc import Callable

import jax

from mvar_jax.errors import InputError
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.window import dense, gather, reference, tiled
from mvar_jax.scales import check_window


def _from_kernel(backend: str, name: str) -> Callable:
    """Return a function of a kernel's module, which is imported at its first call: Pallas takes long to import."""

    def call(*args, **options):
        return getattr(importlib.import_module(f"{__name__}.{backend}"), name)(*args, **options)

    return call


BACKENDS = {
    "reference": reference.attend,
    "dense": dense.attend,
    "gather": gather.attend,
    "tiled": tiled.attend,
    "band": tiled.attend_bands,
    "pallas_gpu": _from_kernel("pallas_gpu", "attend"),
    "pallas_tpu": _from_kernel("pallas_tpu", "attend"),
}

# backend -> the one platform it runs on, and a function that returns its reason to refuse arrays
KERNELS = {
    "pallas_gpu": ("gpu", _from_kernel("pallas_gpu", "why_not")),
    "pallas_tpu": ("tpu", _from_kernel("pallas_tpu", "why_not")),
}

Queries = jax.Array | jax.ShapeDtypeStruct  # what is decided from their shape and dtype needs no values

logger = logging.getLogger(__name__)


def why_not(backend: str, q_BYXHK: Queries) -> str | None:
    """Return the reason that a backend does not support q on the current platform, or None if it does."""
    if backend not in KERNELS:
        return None
    home, refuses = KERNELS[backend]
    platform = current_platform()
    if platform != home:
        return f"it runs on {home}, this is {platform}"
    return refuses(q_BYXHK)


def choose_backend(q_BYXHK: Queries, kernel_size: int) -> str:
    """Return the backend that `auto` means, from the measurements in benchmarks/RESULTS.md.

    GPU, measured on an H100: the Triton kernel, faster than every XLA form at 13x13, 16x16, 32x32 and 64x64, forward
    and with gradients; as on CPU if the kernel does not support the arrays. Elsewhere a window that covers the map
    is plain attention. CPU, measured: one masked product on small maps and if bands would not save half of it, else
    bands; tiles on large maps. TPU, not measured, from rooflines of compiled programs: dense up
    to 32x32, since the matrix unit does one masked product faster than many small ones, splash attention beyond.
    """
    Y, X = q_BYXHK.shape[1:3]
    platform = current_platform()
    if platform == "gpu" and not why_not("pallas_gpu", q_BYXHK):
        return "pallas_gpu"
    if kernel_size >= Y and kernel_size >= X:
        return "dense"
    if platform == "tpu":
        return "dense" if Y * X <= 1024 or why_not("pallas_tpu", q_BYXHK) else "pallas_tpu"
    if Y * X > 576:
        return "tiled"
    return "dense" if Y * X <= 100 or tiled.BAND_ROWS + kernel_size - 1 > Y / 2 else "band"


@functools.cache
def log_once(message: str) -> None:
    logger.info(message)


def resolve_backend(q_BYXHK: Queries, window: int, backend: str) -> str:
    """Return the backend that `local_window_attention` uses for queries of this shape and dtype.

    Raises InputError if it is unknown or does not support this platform or these arrays.
    """
    name = choose_backend(q_BYXHK, window) if backend == "auto" else backend
    if name not in BACKENDS:
        expected = f"auto or one of {', '.join(sorted(BACKENDS))}"
        message = f"window_backend must be {expected}, got {backend!r}"
        raise InputError(message, field="window_backend", given=backend, expected=expected)
    if reason := why_not(name, q_BYXHK):
        expected = f"auto or one of {', '.join(other for other in BACKENDS if not why_not(other, q_BYXHK))}"
        message = f"window_backend {name} cannot be used: {reason}; use {expected}"
        raise InputError(message, field="window_backend", given=name, expected=expected)
    if backend == "auto":
        Y, X = q_BYXHK.shape[1:3]
        log_once(f"local window {window} on {Y} x {X}, {q_BYXHK.dtype}, {current_platform()}: {name}")
    return name


def triton_rule(q_BYXHK: Queries, window: int, backend: str):
    """Return the rule of the Triton kernels (ops/triton_attention) if they are the backend, or None."""
    if resolve_backend(q_BYXHK, window, backend) != "pallas_gpu":
        return None
    return _from_kernel("pallas_gpu", "rule_of")(*q_BYXHK.shape[1:3], window)


def local_window_attention(
    q_BYXHK: jax.Array,
    k_BYXHK: jax.Array,
    v_BYXHK: jax.Array,
    window: int,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> jax.Array:
    """Let the query at (i, j) attend to W x W keys, their rows from clip(i - W//2, 0, Y - W) on, columns alike.

    Differentiable; works under jit, vmap, shard_map and with batch or heads sharded, without communication.

    Args:
      q_BYXHK, k_BYXHK, v_BYXHK: `[B, Y, X, H, K]` of one dtype.
      window: odd window side W; a window larger than the map is cut to the map.
      scale: factor of the logits.
      backend: a name of the table above, or "auto" for `choose_backend`.

    Returns `[B, Y, X, H, K]` in the dtype of the inputs; logits and softmax are float32.

    Raises InputError if the window is even, shapes or dtypes differ, or the backend is unknown or does not support
    this platform or these arrays.
    """
    check_window(window, "window")
    for name, x in (("k", k_BYXHK), ("v", v_BYXHK)):
        if x.shape != q_BYXHK.shape or x.dtype != q_BYXHK.dtype:
            given, expected = (f"{y.dtype}{list(y.shape)}" for y in (x, q_BYXHK))
            message = f"{name} must have q's dtype and shape, {expected}, got {given}"
            raise InputError(message, field=name, given=given, expected=expected)
    if q_BYXHK.ndim != 5:
        expected = "[batch, rows, columns, heads, head width]"
        message = f"q must have shape {expected}, got {list(q_BYXHK.shape)}"
        raise InputError(message, field="q", given=q_BYXHK.shape, expected=expected)
    name = resolve_backend(q_BYXHK, window, backend)
    return BACKENDS[name](q_BYXHK, k_BYXHK, v_BYXHK, window, scale)
