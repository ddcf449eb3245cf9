"""Grids of images for people: contact sheets, originals next to reconstructions, columns with captions."""

import math
import os

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import replacing
from mvar_jax.ops.pixels import to_levels

CAPTION_PX = 14
GRID_IMAGES = 400  # a larger grid is too large to look at


def to_uint8(images_BYX3, truncate: bool = False) -> np.ndarray:
    """Images in [-1, 1] as uint8 on the host; see `to_levels`."""
    return np.asarray(to_levels(np.asarray(images_BYX3, np.float32), truncate))


def tile_grid(images_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """Return one image, uint8 [rows, columns, 3], that shows all images row by row on white.

    Args:
      images_BYX3: [B, Y, X, 3] uint8.
      columns: images in a row.
      pad: white pixels between the images and around them.
      zoom: repetitions of every pixel in each direction, so that tiny images can be seen.

    Raises:
      InputError: the images are not uint8 RGB, the batch is empty, or `columns` or `zoom` is below 1.
    """
    images_BYX3 = np.asarray(images_BYX3)
    if images_BYX3.dtype != np.uint8 or images_BYX3.ndim != 4 or images_BYX3.shape[3] != 3:
        given = f"{images_BYX3.dtype} {list(images_BYX3.shape)}"
        raise _refuse("images", given, "uint8 [B, Y, X, 3]")
    if len(images_BYX3) == 0 or min(columns, zoom) < 1:
        given = f"{len(images_BYX3)} images, columns={columns}, zoom={zoom}"
        raise _refuse("grid", given, "at least 1 of each of images, columns and zoom")
    height, width = images_BYX3.shape[1:3]
    grid = Grid(len(images_BYX3), columns, height, width, pad, zoom)
    for number, image_YX3 in enumerate(images_BYX3):
        grid.put(number, image_YX3)
    return grid.image_YX3


class Grid:
    """The image of `tile_grid`, filled one by one, so that the images need not be in memory together.

    Args:
      num: number of images.
      columns, pad, zoom: as in `tile_grid`.
      height, width: of each image.
    """

    def __init__(self, num: int, columns: int, height: int, width: int, pad: int = 2, zoom: int = 1):
        self._columns, self._zoom = min(columns, num), zoom
        self._pad, self._height, self._width = pad, height * zoom, width * zoom
        rows = math.ceil(num / self._columns)
        size = pad + rows * (self._height + pad), pad + self._columns * (self._width + pad), 3
        self.image_YX3 = np.full(size, 255, np.uint8)

    def put(self, number: int, image_YX3: np.ndarray) -> None:
        """Show an image in its place, `[Y, X, 3] uint8`."""
        row, column = divmod(number, self._columns)
        top, left = self._pad + row * (self._height + self._pad), self._pad + column * (self._width + self._pad)
        zoomed = image_YX3.repeat(self._zoom, axis=0).repeat(self._zoom, axis=1)
        self.image_YX3[top : top + self._height, left : left + self._width] = zoomed


def side_by_side(originals_BYX3, reconstructions_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """Return a grid with `columns` pairs in a row: an original and, touching its right edge, its reconstruction.

    Raises InputError if the shapes differ; the rest as `tile_grid`.
    """
    originals_BYX3, reconstructions_BYX3 = np.asarray(originals_BYX3), np.asarray(reconstructions_BYX3)
    if originals_BYX3.shape != reconstructions_BYX3.shape:
        raise _refuse(
            "reconstructions", reconstructions_BYX3.shape, f"of the originals' shape {originals_BYX3.shape}"
        )
    return tile_grid(np.concatenate([originals_BYX3, reconstructions_BYX3], axis=2), columns, pad, zoom)


def tile_columns(columns: dict[str, np.ndarray], pad: int = 2, zoom: int = 1) -> np.ndarray:
    """Return a grid with a column for each name, written above it, and a row for each image.

    columns: images by name, each `[B, Y, X, 3] uint8` and of one shape. Raises InputError as `tile_grid`.
    """
    from PIL import Image, ImageDraw

    images_BCYX3 = np.stack([np.asarray(images) for images in columns.values()], axis=1)
    grid_YX3 = tile_grid(images_BCYX3.reshape(-1, *images_BCYX3.shape[2:]), len(columns), pad, zoom)
    head_YX3 = np.full((CAPTION_PX, *grid_YX3.shape[1:]), 255, np.uint8)
    picture = Image.fromarray(np.concatenate([head_YX3, grid_YX3]))
    draw, pitch = ImageDraw.Draw(picture), pad + images_BCYX3.shape[3] * zoom
    for number, name in enumerate(columns):
        draw.text((pad + number * pitch, 1), name, fill=(0, 0, 0))
    return np.asarray(picture)


def _refuse(field: str, given: object, expected: str) -> InputError:
    return InputError(f"{field} must be {expected}, got {given}", field=field, given=given, expected=expected)


def save_png(path: str | os.PathLike, image_YX3: np.ndarray) -> None:
    """Write a uint8 RGB image atomically, making missing folders."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image_YX3).save(temporary, format="PNG")


def min_zoom(side: int) -> int:
    """Return the zoom that makes images of this side at least 96 pixels large."""
    return max(1, 96 // side)
