"""Pictures for people: image grids, originals beside reconstructions, training curves. Written atomically."""

import math
import os

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import replacing
from mvar_jax.ops.pixels import to_levels

GRID_IMAGES = 400  # a larger grid is of no use to an eye


def to_uint8(images_BYX3, truncate: bool = False) -> np.ndarray:
    """Images in [-1, 1] as uint8 on the host; see `to_levels`."""
    return np.asarray(to_levels(np.asarray(images_BYX3, np.float32), truncate))


def tile_grid(images_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """One uint8 picture [rows, columns, 3] of uint8 images, row by row, on white.

    `pad` white pixels separate the images and frame the picture; `zoom` repeats every pixel of an image
    `zoom` times each way, so that tiny images can be seen. Raises InputError for anything but uint8 RGB.
    """
    images_BYX3 = np.asarray(images_BYX3)
    if images_BYX3.dtype != np.uint8 or images_BYX3.ndim != 4 or images_BYX3.shape[3] != 3:
        raise InputError("images", f"{images_BYX3.dtype} {images_BYX3.shape}", "uint8 [B, Y, X, 3]")
    if len(images_BYX3) == 0 or min(columns, zoom) < 1:
        given = f"{len(images_BYX3)} images, columns={columns}, zoom={zoom}"
        raise InputError("grid", given, "at least 1 of each")
    images_BYX3 = images_BYX3.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = images_BYX3.shape[1:3]
    columns = min(columns, len(images_BYX3))
    rows = math.ceil(len(images_BYX3) / columns)
    grid = np.full((pad + rows * (height + pad), pad + columns * (width + pad), 3), 255, np.uint8)
    for i, image_YX3 in enumerate(images_BYX3):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = image_YX3
    return grid


def side_by_side(originals_BYX3, reconstructions_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """A grid of `columns` pairs a row, each an original and, touching its right edge, its reconstruction."""
    originals_BYX3, reconstructions_BYX3 = np.asarray(originals_BYX3), np.asarray(reconstructions_BYX3)
    if originals_BYX3.shape != reconstructions_BYX3.shape:
        raise InputError("reconstructions", reconstructions_BYX3.shape, f"shape {originals_BYX3.shape}")
    return tile_grid(np.concatenate([originals_BYX3, reconstructions_BYX3], axis=2), columns, pad, zoom)


def save_png(path: str | os.PathLike, image_YX3: np.ndarray) -> None:
    """Writes a uint8 RGB picture; folders are made, and a reader never sees half a file."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image_YX3).save(temporary, format="PNG")


def min_zoom(side: int) -> int:
    """Pixel repetition that makes small images visible."""
    return max(1, 96 // side)
