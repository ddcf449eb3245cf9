"""Area downsampling and bicubic upsampling by one constant matrix per axis (docs/method.md, Tokenizer)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.precision import precision_of

KEYS_A = -0.75  # as PyTorch; jax.image.resize uses -0.5


@functools.lru_cache(maxsize=256)
def area_matrix(source: int, target: int) -> np.ndarray:
    """Return `[target, source] float32`: adaptive average pooling over floor(i*s/t) .. ceil((i+1)*s/t)."""
    matrix = np.zeros((target, source), np.float32)
    for i in range(target):
        begin, end = i * source // target, -(-(i + 1) * source // target)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


@functools.lru_cache(maxsize=256)
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Return `[target, source] float32`: the Keys kernel with a = -0.75.

    Half-pixel centres, replicated border, no antialiasing.
    """
    a = KEYS_A

    def near(x):  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    matrix = np.zeros((target, source), np.float64)
    for i in range(target):
        place = (i + 0.5) * source / target - 0.5
        floor = int(np.floor(place))
        t = place - floor
        for offset, weight in zip((-1, 0, 1, 2), (far(t + 1), near(t), near(1 - t), far(2 - t)), strict=True):
            matrix[i, np.clip(floor + offset, 0, source - 1)] += weight
    return matrix.astype(np.float32)


def _apply(matrix_ty: np.ndarray, x_BYXc: jax.Array) -> jax.Array:
    """Apply one matrix to rows and columns, in full float32: TF32 or bfloat16 rounding would change f_hat."""
    m, precision = jnp.asarray(matrix_ty), precision_of("quantizer", jnp.float32)
    x = jnp.einsum("iy,byxc->bixc", m, x_BYXc.astype(jnp.float32), precision=precision)
    return jnp.einsum("jx,bixc->bijc", m, x, precision=precision)


def resize_area(x_BYXc: jax.Array, side: int) -> jax.Array:
    """Resize `[B, y, y, c]` to `[B, side, side, c] float32` by area averaging; the identity at equal sizes."""
    source = x_BYXc.shape[1]
    return x_BYXc if source == side else _apply(area_matrix(source, side), x_BYXc)


def resize_bicubic(x_BYXc: jax.Array, side: int) -> jax.Array:
    """Resize `[B, y, y, c]` to `[B, side, side, c] float32` by bicubic interpolation; the identity at equal sizes."""
    source = x_BYXc.shape[1]
    return x_BYXc if source == side else _apply(bicubic_matrix(source, side), x_BYXc)
