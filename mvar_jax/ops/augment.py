"""Differentiable augmentation of what a discriminator sees (Zhao et al., arXiv 2006.10738): shift, colour, cut-out.

Every sample has its own numbers, a function of the seed, its index in the data, the step and the pass alone: not of
the batch or the mesh. Real images and reconstructions have different ones, and so has the generator's pass, as in the
public programs: a discriminator must not learn to compare the pair.
"""

import enum

import jax
import jax.numpy as jnp

from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.ops.resize import area_matrix

SHIFT = 0.125  # of the side: the largest shift
CUT = 0.2  # of the side: the square that is cut out
# shift, brightness, saturation, contrast, place of the cut, whether a part is taken, its place
NUM_DRAWS = 10


class Pass(enum.IntEnum):
    """What is augmented: the discriminator's real images, its reconstructions, or the generator's reconstructions."""

    REAL = 0
    FAKE = 1
    GENERATOR = 2


def draw_augmentations(seed: int, index_B: jax.Array, step: jax.Array | int, of: Pass) -> jax.Array:
    """Return uniform numbers in [0, 1), `[B, NUM_DRAWS] float32`, one row per sample.

    index_B: integers [B], each sample's place in the training stream.
    """

    def draw(key):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, step), int(of)), (NUM_DRAWS,))

    return jax.vmap(draw)(keys_of_samples(seed, index_B))


def augment(images_BYXC: jax.Array, draws_BN: jax.Array, crop_side: int | None = None) -> jax.Array:
    """Return images shifted, with other colours, and with a square of zeros.

    Args:
      images_BYXC: `[B, Y, X, C] float32` in [-1, 1], any number of channels; a single channel has no saturation.
      draws_BN: of `draw_augmentations`.
      crop_side: a discriminator's input side. If both sides are larger, half of the samples are cropped to it at a
        random place, the others resized by area averaging. None keeps the size.
    """
    draws = [draws_BN[:, i, None, None, None] for i in range(NUM_DRAWS)]
    x = _shift(images_BYXC, draws_BN[:, :2])
    x = x + draws[2] - 0.5
    mean = x.mean(3, keepdims=True)
    x = (x - mean) * (2 * draws[3]) + mean
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * (draws[4] + 0.5) + mean
    x = _cut(x, draws_BN[:, 5:7])
    if crop_side is None or min(x.shape[1:3]) <= crop_side:
        return x
    return _crop_or_resize(x, draws_BN[:, 7:10], crop_side)


def _apply(rows_BiY: jax.Array, columns_BjX: jax.Array, x_BYXC: jax.Array) -> jax.Array:
    """Multiply each sample by its own matrices; unlike a gather, a product needs no scatter backward."""
    precision = precision_of("losses", jnp.float32)
    x = jnp.einsum("biy,byxc->bixc", rows_BiY, x_BYXC, precision=precision)
    return jnp.einsum("bjx,bixc->bijc", columns_BjX, x, precision=precision)


def _places(draws_B: jax.Array, num: int) -> jax.Array:
    """Return whole numbers below `num`, `[B] int32`."""
    return jnp.floor(draws_B * num).astype(jnp.int32)


def _selection(begin_B: jax.Array, size: int, source: int) -> jax.Array:
    """Return `[B, size, source]`: rows begin..begin + size of `source` rows, zeros outside."""
    rows = begin_B[:, None, None] + jnp.arange(size)[:, None]
    return (rows == jnp.arange(source)).astype(jnp.float32)


def _shift(x_BYXC: jax.Array, draws_B2: jax.Array) -> jax.Array:
    matrices = []
    for axis, size in enumerate(x_BYXC.shape[1:3]):
        most = round(size * SHIFT)
        matrices.append(_selection(_places(draws_B2[:, axis], 2 * most + 1) - most, size, size))
    return _apply(matrices[0], matrices[1], x_BYXC)


def _cut(x_BYXC: jax.Array, draws_B2: jax.Array) -> jax.Array:
    inside = []
    for axis, size in enumerate(x_BYXC.shape[1:3]):
        width = round(size * CUT)
        begin_B = _places(draws_B2[:, axis], size + 1 - width % 2) - width // 2
        place = jnp.arange(size) - begin_B[:, None]
        inside.append((place >= 0) & (place < width))
    rows, columns = inside
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0.0, x_BYXC)


def _crop_or_resize(x_BYXC: jax.Array, draws_B3: jax.Array, side: int) -> jax.Array:
    is_crop_B11 = (draws_B3[:, 0] < 0.5)[:, None, None]
    matrices = []
    for axis, size in enumerate(x_BYXC.shape[1:3]):
        crop = _selection(_places(draws_B3[:, 1 + axis], size - side + 1), side, size)
        matrices.append(jnp.where(is_crop_B11, crop, jnp.asarray(area_matrix(size, side))))
    return _apply(matrices[0], matrices[1], x_BYXC)
