"""What happens to one item before it is batched: pure functions of (item, rng); no rng, no randomness."""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image
from scipy import ndimage

from mvar_jax.data.decoding import MAX_PIXELS, BadImage, open_rgb
from mvar_jax.errors import InputError
from mvar_jax.ops.pixels import from_levels

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

    def view(self, image: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """View `view` of a token cache: the first is the image itself, the others are augmented."""
        return self(image, None if view == 0 else rng)

    def check_views(self, num_views: int) -> None:
        """Raises InputError for fewer than one view."""
        if num_views < 1:
            raise InputError("data.num_views", num_views, "1 or more")


CROPS = ("centre", "random", "resized")


@dataclasses.dataclass(frozen=True)
class PhotoTransform:
    """A photograph, encoded bytes or uint8 pixels, to float32 [image_size, image_size, 3] in [-1, 1].

    crop "centre": as in ADM (arXiv 2105.05233), to the last byte: box halving while the shorter side is at least
    twice `image_size`, bicubic resize of the shorter side, centre crop. With an rng, "random" is ADM's other crop:
    the shorter side is resized to a whole number from image_size to image_size / min_crop, then cut anywhere;
    "resized" cuts a share of the area from min_crop to 1 with sides 3:4 to 4:3, resized to the square. Without
    an rng both are the centre crop. Then, with an rng and `flip`, a mirror image with probability 1/2.
    upright: obey the camera's orientation tag. Raises BadImage for bytes that hold no usable image.
    """

    image_size: int
    flip: bool
    crop: str = "centre"
    min_crop: float = 0.8
    upright: bool = True

    def __post_init__(self):
        if self.crop not in CROPS:
            raise InputError("data.crop", self.crop, f"one of {', '.join(CROPS)}")
        if not 0 < self.min_crop <= 1:
            raise InputError("data.min_crop", self.min_crop, "a share above 0, at most 1")

    def __call__(self, image: np.ndarray | bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        return from_levels(self.pixels(image, rng))

    def pixels(self, image: np.ndarray | bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """The same as uint8: a quarter of the bytes, for the way from a worker process."""
        # drawn first, and as PickView draws: training from images and from the cache of both flips then agree
        is_mirrored = self.flip and rng is not None and rng.integers(2) == 1
        return self._pixels(image, rng, is_mirrored)

    def view(self, image: np.ndarray | bytes, view: int, rng: np.random.Generator) -> np.ndarray:
        """View `view` of a token cache: with `flip` odd ones are mirrored; the first of each is a centre crop."""
        num_kinds = 2 if self.flip else 1
        return from_levels(self._pixels(image, rng if view >= num_kinds else None, view % num_kinds == 1))

    def check_views(self, num_views: int) -> None:
        """Raises InputError where a cache of so many views would repeat itself or leave the flip out."""
        num_kinds = 2 if self.flip else 1
        is_right = num_views == num_kinds if self.crop == "centre" else num_views % num_kinds == 0
        if num_views < 1 or not is_right:
            many = "" if self.crop == "centre" else "a multiple of "
            raise InputError("data.num_views", num_views, f"{many}{num_kinds} (flip={self.flip}, crop={self.crop})")

    def _pixels(self, image, rng: np.random.Generator | None, is_mirrored: bool) -> np.ndarray:
        if isinstance(image, bytes):
            picture = open_rgb(image, upright=self.upright)
        elif image.dtype != np.uint8:
            raise InputError("image", image.dtype, "uint8 pixels")
        else:
            picture = Image.fromarray(image).convert("RGB")
        if rng is None or self.crop == "centre":
            picture = _cut(*_shrink(picture, self.image_size), self.image_size)
        elif self.crop == "random":
            short_side = rng.integers(self.image_size, math.ceil(self.image_size / self.min_crop), endpoint=True)
            picture = _cut(*_shrink(picture, int(short_side)), self.image_size, rng)
        else:
            picture = _cut_resized(picture, self.image_size, self.min_crop, rng)
        pixels_YX3 = np.asarray(picture)
        return np.ascontiguousarray(pixels_YX3[:, ::-1]) if is_mirrored else pixels_YX3


def _shrink(picture: Image.Image, short_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """(picture after box halving, the size to which it is still to be resized), as in ADM."""
    while min(picture.size) >= 2 * short_side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    ratio = short_side / min(picture.size)
    return picture, (round(picture.width * ratio), round(picture.height * ratio))


def _cut(picture, new_size: tuple[int, int], side: int, rng: np.random.Generator | None = None) -> Image.Image:
    """Bicubic resize, then the square at the centre, or anywhere with an rng."""
    if new_size[0] * new_size[1] > MAX_PIXELS:
        raise BadImage(f"{picture.width} x {picture.height} pixels: too long and thin to cut a square from")
    spare_x, spare_y = new_size[0] - side, new_size[1] - side
    left, top = (spare_x // 2, spare_y // 2) if rng is None else rng.integers((spare_x + 1, spare_y + 1)).tolist()
    picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + side, top + side))


def _cut_resized(picture: Image.Image, side: int, min_area: float, rng: np.random.Generator) -> Image.Image:
    """A random share of the area, resized to the square; a side longer than the picture's is cut to it."""
    area = rng.uniform(min_area, 1) * picture.width * picture.height
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(picture.width, max(1, round(math.sqrt(area * aspect))))
    height = min(picture.height, max(1, round(math.sqrt(area / aspect))))
    left, top = rng.integers((picture.width - width + 1, picture.height - height + 1)).tolist()
    box = (left, top, left + width, top + height)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
