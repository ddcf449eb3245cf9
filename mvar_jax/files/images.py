"""Grids of images for people: contact sheets, originals next to reconstructions, columns with captions."""

import math
import os

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import replacing
from mvar_jax.ops.pixels import MODES, to_levels

CAPTION_PX = 14
GRID_IMAGES, GRID_COLUMNS = 400, 32  # a larger grid is too large to look at


def to_uint8(images_BYX3, truncate: bool = False) -> np.ndarray:
    """Images in [-1, 1] as uint8 on the host; see `to_levels`."""
    return np.asarray(to_levels(np.asarray(images_BYX3, np.float32), truncate))


def tile_grid(images_BYXC, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """Return one image, uint8 [rows, columns, C], that shows all images row by row on white.

    Args:
      images_BYXC: [B, Y, X, C] uint8, with 1 (grey), 3 (RGB) or 4 (RGBA) channels.
      columns: images in a row.
      pad: white pixels between the images and around them.
      zoom: repetitions of every pixel in each direction, so that tiny images can be seen.

    Raises:
      InputError: the images are not such, the batch is empty, or `columns` or `zoom` is below 1.
    """
    images_BYXC = np.asarray(images_BYXC)
    if images_BYXC.dtype != np.uint8 or images_BYXC.ndim != 4 or images_BYXC.shape[3] not in MODES:
        given = f"{images_BYXC.dtype} {list(images_BYXC.shape)}"
        raise _refuse("images", given, "uint8 [B, Y, X, C] with C of 1, 3 or 4")
    if len(images_BYXC) == 0 or min(columns, zoom) < 1:
        given = f"{len(images_BYXC)} images, columns={columns}, zoom={zoom}"
        raise _refuse("grid", given, "at least 1 of each of images, columns and zoom")
    grid = Grid(len(images_BYXC), columns, images_BYXC.shape[1:], pad, zoom)
    for number, image_YXC in enumerate(images_BYXC):
        grid.put(number, image_YXC)
    return grid.image_YXC


class Grid:
    """The image of `tile_grid`, filled one by one, so that the images need not be in memory together.

    Args:
      num: number of images.
      columns, pad, zoom: as in `tile_grid`.
      shape: of each image, (Y, X, C).
    """

    def __init__(self, num: int, columns: int, shape: tuple[int, int, int], pad: int = 2, zoom: int = 1):
        height, width, channels = shape
        self._columns, self._zoom = min(columns, num), zoom
        self._pad, self._height, self._width = pad, height * zoom, width * zoom
        rows = math.ceil(num / self._columns)
        size = pad + rows * (self._height + pad), pad + self._columns * (self._width + pad), channels
        self.image_YXC = np.full(size, 255, np.uint8)

    def put(self, number: int, image_YXC: np.ndarray) -> None:
        """Show an image in its place, `[Y, X, C] uint8`."""
        row, column = divmod(number, self._columns)
        top, left = self._pad + row * (self._height + self._pad), self._pad + column * (self._width + self._pad)
        zoomed = image_YXC.repeat(self._zoom, axis=0).repeat(self._zoom, axis=1)
        self.image_YXC[top : top + self._height, left : left + self._width] = zoomed


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

    columns: images by name, each `[B, Y, X, C] uint8` and of one shape. Raises InputError as `tile_grid`.
    """
    from PIL import ImageDraw

    images_BNYXC = np.stack([np.asarray(images) for images in columns.values()], axis=1)
    grid_YXC = tile_grid(images_BNYXC.reshape(-1, *images_BNYXC.shape[2:]), len(columns), pad, zoom)
    head_YXC = np.full((CAPTION_PX, *grid_YXC.shape[1:]), 255, np.uint8)
    whole_YXC = np.concatenate([head_YXC, grid_YXC])
    picture = to_picture(whole_YXC)
    draw, pitch = ImageDraw.Draw(picture), pad + images_BNYXC.shape[3] * zoom
    for number, name in enumerate(columns):
        draw.text((pad + number * pitch, 1), name, fill="black")
    return np.asarray(picture).reshape(whole_YXC.shape)


def _refuse(field: str, given: object, expected: str) -> InputError:
    return InputError(f"{field} must be {expected}, got {given}", field=field, given=given, expected=expected)


def to_picture(image_YXC: np.ndarray):
    """Return Pillow's image of pixels `[Y, X, C] uint8` or `[Y, X]`: mode L, RGB or RGBA."""
    from PIL import Image

    return Image.fromarray(image_YXC[..., 0] if image_YXC.shape[2:] == (1,) else image_YXC)


def save_png(path: str | os.PathLike, image_YXC: np.ndarray) -> None:
    """Write a uint8 grey, RGB or RGBA image atomically, making missing folders."""
    with replacing(path) as temporary:
        to_picture(image_YXC).save(temporary, format="PNG")


def min_zoom(side: int) -> int:
    """Return the zoom that makes images of this side at least 96 pixels large."""
    return max(1, 96 // side)
