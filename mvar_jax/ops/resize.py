"""Area, bicubic (docs/method.md, Tokenizer) and TensorFlow 1's bilinear resizing by one constant matrix per axis."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.precision import precision_of
from mvar_jax.scales import Side, shape_of

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


@functools.lru_cache(maxsize=256)
def tf1_matrix(source: int, target: int) -> np.ndarray:
    """Return `[target, source] float32`: bilinear weights at i * source / target.

    No half-pixel centres, no antialiasing, a replicated border: `tf.compat.v1.image.resize_bilinear`, which the 2015
    Inception graph contains. Positions are float32 as there. The identity at equal sizes.
    """
    places = np.arange(target, dtype=np.float32) * np.float32(source / target)
    low = np.floor(places).astype(int)
    t = places - low.astype(np.float32)
    matrix = np.zeros((target, source), np.float32)
    matrix[np.arange(target), low] = 1 - t
    matrix[np.arange(target), np.minimum(low + 1, source - 1)] += t
    return matrix


def _apply(matrix_iy: np.ndarray, x_BYXc: jax.Array, matrix_jx: np.ndarray | None = None) -> jax.Array:
    """Apply a matrix to the rows and one to the columns (None: the same), in full float32.

    TF32 or bfloat16 rounding would change f_hat and the evaluation's features.
    """
    rows = jnp.asarray(matrix_iy)
    columns, precision = rows if matrix_jx is None else jnp.asarray(matrix_jx), precision_of("quantizer", jnp.float32)
    x = jnp.einsum("iy,byxc->bixc", rows, x_BYXc.astype(jnp.float32), precision=precision)
    return jnp.einsum("jx,bixc->bijc", columns, x, precision=precision)


def resize_area(x_BYXc: jax.Array, side: Side) -> jax.Array:
    """Resize `[B, y, x, c]` to a side or (height, width), float32, by area averaging; the identity at equal sizes."""
    return _resize(area_matrix, x_BYXc, side)


def resize_bicubic(x_BYXc: jax.Array, side: Side) -> jax.Array:
    """Resize `[B, y, x, c]` to a side or (height, width), float32, bicubically; the identity at equal sizes."""
    return _resize(bicubic_matrix, x_BYXc, side)


def _resize(matrix: Callable[[int, int], np.ndarray], x_BYXc: jax.Array, side: Side) -> jax.Array:
    before, after = x_BYXc.shape[1:3], shape_of(side)
    if before == after:
        return x_BYXc
    rows, columns = (matrix(source, target) for source, target in zip(before, after, strict=True))
    return _apply(rows, x_BYXc, columns)


def resize_tf1(x_BYXc: jax.Array, side: int) -> jax.Array:
    """Resize `[B, Y, X, c]` to `[B, side, side, c] float32` bilinearly as TensorFlow 1 does; see `tf1_matrix`."""
    num_rows, num_columns = x_BYXc.shape[1:3]
    return _apply(tf1_matrix(num_rows, side), x_BYXc, tf1_matrix(num_columns, side))
