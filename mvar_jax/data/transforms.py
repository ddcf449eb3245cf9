"""What happens to one item before it is batched: pure functions of (item, rng); no rng, no randomness."""

import dataclasses
import functools
import os

import numpy as np
from PIL import Image
from scipy import ndimage

from mvar_jax.errors import InputError

_PAD_PX = 4  # of background around a digit: keeps the spline's border effects and every warp inside the array


@functools.lru_cache(maxsize=8)
def _centred_grid(out_side: int, in_side: int) -> np.ndarray:
    """Output pixel centres in input pixels from the image centre: [2, out_side**2], rows then columns."""
    centres = (np.arange(out_side) + 0.5) * in_side / out_side - in_side / 2
    return np.stack(np.meshgrid(centres, centres, indexing="ij")).reshape(2, -1)


@dataclasses.dataclass(frozen=True)
class DigitTransform:
    """Warp a small grey image in [0, 1] to float32 [image_size, image_size, 3] in [-1, 1].

    One resampling, by cubic splines, with half-pixel centres; the background is 0. With an rng: rotation up
    to +-`degrees`, shift up to +-`shift_px` input pixels per axis, magnification 1 +- `scale`,
    horizontal shear +- `shear`, each uniform, all about the image centre.
    """

    image_size: int = 32
    degrees: float = 5.0
    shift_px: float = 0.15
    scale: float = 0.03
    shear: float = 0.04

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        if image.ndim != 2 or image.shape[0] != image.shape[1]:
            raise InputError("image", image.shape, "the shape of a square grey image, (side, side)")
        side = image.shape[0]
        coordinates = _centred_grid(self.image_size, side)
        if rng is not None:
            angle, shift_y, shift_x, magnify, shear = rng.uniform(-1, 1, 5)
            angle = np.deg2rad(self.degrees * angle)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            to_input = rotation @ [[1, 0], [self.shear * shear, 1]] / (1 + self.scale * magnify)
            coordinates = to_input @ coordinates + self.shift_px * np.array([[shift_y], [shift_x]])
        warped = ndimage.map_coordinates(
            np.pad(image, _PAD_PX), coordinates + ((side - 1) / 2 + _PAD_PX), order=3, output=np.float32
        )
        grey_YX1 = 2 * np.clip(warped, 0, 1).reshape(self.image_size, self.image_size, 1) - 1
        return np.repeat(grey_YX1, 3, axis=-1)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as uint8 [Y, X, 3]. Raises InputError where it is none, or too large to be honest."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("images", str(path), f"a readable image ({error})") from None


@dataclasses.dataclass(frozen=True)
class PhotoTransform:
    """Centre crop of a uint8 photograph to float32 [image_size, image_size, 3] in [-1, 1], as in ADM.

    Box halving while the shorter side is at least twice `image_size`, bicubic resize of the shorter side,
    centre crop (arXiv 2105.05233); then, with an rng and `flip`, a horizontal flip with probability 1/2.
    Grey images get three channels.
    """

    image_size: int
    flip: bool

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        if image.dtype != np.uint8:
            raise InputError("image", image.dtype, "uint8 pixels")
        picture = Image.fromarray(image).convert("RGB")
        while min(picture.size) >= 2 * self.image_size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        ratio = self.image_size / min(picture.size)
        new_size = (round(picture.width * ratio), round(picture.height * ratio))
        picture = picture.resize(new_size, Image.Resampling.BICUBIC)
        left, top = (new_size[0] - self.image_size) // 2, (new_size[1] - self.image_size) // 2
        picture = picture.crop((left, top, left + self.image_size, top + self.image_size))
        pixels_YX3 = np.asarray(picture, np.float32) / 127.5 - 1
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels_YX3 = pixels_YX3[:, ::-1]
        return np.ascontiguousarray(pixels_YX3)


@dataclasses.dataclass(frozen=True)
class PickView:
    """One of an image's cached views, ids [views, L] -> [L]: a uniform draw, or the first without an rng."""

    def __call__(self, ids: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        return ids[0] if rng is None else ids[rng.integers(len(ids))]
