"""From the image of an item to uint8 pixels: pure functions of (image, rng), deterministic without an rng."""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

from mvar_jax.data.decoding import MAX_PIXELS, BadImage, open_rgb, pixels_of
from mvar_jax.errors import InputError
from mvar_jax.files.images import to_picture
from mvar_jax.ops.pixels import MODES

_PAD_PX = 4  # of background around a digit: keeps the spline's border effects and every warp inside the array


@functools.lru_cache(maxsize=8)
def _centred_grid(out_side: int, in_side: int) -> np.ndarray:
    """Return output pixel centres in input pixels from the image centre: [2, out_side**2], rows then columns."""
    centres = (np.arange(out_side) + 0.5) * in_side / out_side - in_side / 2
    return np.stack(np.meshgrid(centres, centres, indexing="ij")).reshape(2, -1)


@dataclasses.dataclass(frozen=True)
class DigitTransform:
    """Warps a small grey image in [0, 1] to uint8 [image_size, image_size, channels]; alpha is opaque.

    One resampling by cubic splines with half-pixel centres; the background is 0. With an rng: rotation up
    to +-`degrees`, shift up to +-`shift_px` input pixels per axis, magnification 1 +- `scale`,
    horizontal shear +- `shear`, each uniform, all about the image centre.
    """

    image_size: int = 32
    degrees: float = 5.0
    shift_px: float = 0.15
    scale: float = 0.03
    shear: float = 0.04
    channels: int = 3

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the warped image. Raises InputError unless `image` is square and grey."""
        from scipy import ndimage  # slow to import

        if image.ndim != 2 or image.shape[0] != image.shape[1]:
            raise InputError(
                f"image must be a square grey image of shape (side, side), got shape {image.shape}",
                field="image",
                given=image.shape,
                expected="(side, side)",
            )
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
        levels_YX1 = np.rint(255 * np.clip(warped, 0, 1)).reshape(self.image_size, self.image_size, 1)
        pixels = np.repeat(levels_YX1.astype(np.uint8), self.channels, axis=-1)
        if self.channels == 4:
            pixels[..., 3] = 255
        return pixels

    def describe(self) -> str:
        """Return in words what is done to an image without an rng."""
        return f"enlarged to {self.image_size} x {self.image_size} pixels by cubic splines"

    def view(self, image: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Return view `view` of a token cache: view 0 is the image itself, the others are augmented."""
        return self(image, None if view == 0 else rng)

    def check_views(self, num_views: int) -> None:
        """Raise InputError if a cache would hold no view."""
        if num_views < 1:
            raise InputError(
                f"data.num_views must be 1 or more, got {num_views}",
                field="data.num_views",
                given=num_views,
                expected="1 or more",
            )


CROPS = ("centre", "random", "resized")


@dataclasses.dataclass(frozen=True)
class PhotoTransform:
    """Cuts a photograph, encoded bytes or uint8 pixels, to uint8 [image_size, image_size, channels].

    crop "centre": as in ADM (arXiv 2105.05233), bit for bit: box halving while the shorter side is at least
    twice `image_size`, bicubic resize of the shorter side, centre crop. With an rng, "random" is ADM's other crop:
    the shorter side is resized to a whole number from image_size to image_size / min_crop, then cut anywhere;
    "resized" cuts a share of the area from min_crop to 1 with sides 3:4 to 4:3, resized to the square. Without
    an rng both are the centre crop. Then, with an rng and `flip`, the image is mirrored with probability 1/2.

    Attributes:
      image_size: side of the result in pixels.
      flip: whether images are mirrored.
      crop: one of CROPS.
      min_crop: smallest share of the side ("random") or of the area ("resized") that a crop keeps.
      upright: obey the camera's orientation tag.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
      InputError: a field is out of range.
    """

    image_size: int
    flip: bool
    crop: str = "centre"
    min_crop: float = 0.8
    upright: bool = True
    channels: int = 3

    def __post_init__(self):
        if self.crop not in CROPS:
            allowed = ", ".join(CROPS)
            raise InputError(
                f"data.crop must be one of {allowed}, got {self.crop!r}",
                field="data.crop",
                given=self.crop,
                expected=allowed,
            )
        if not 0 < self.min_crop <= 1:
            raise InputError(
                f"data.min_crop must be above 0 and at most 1, got {self.min_crop}",
                field="data.min_crop",
                given=self.min_crop,
                expected="above 0, at most 1",
            )

    def __call__(self, image: np.ndarray | bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the cropped image. Raises BadImage if the bytes hold no usable image."""
        # drawn first, like the view of a token cache: images and the cache of both flips then give equal batches
        is_mirrored = self.flip and rng is not None and rng.integers(2) == 1
        return self._cut(image, rng, is_mirrored)

    def describe(self) -> str:
        """Return in words what is done to an image without an rng."""
        turned = "turned upright" if self.upright else "orientation tag ignored"
        return f"{turned}, then ADM's centre crop to {self.image_size} x {self.image_size} pixels"

    def view(self, image: np.ndarray | bytes, view: int, rng: np.random.Generator) -> np.ndarray:
        """Return view `view` of a token cache: with `flip` odd ones are mirrored; the first of each is centred."""
        num_kinds = 2 if self.flip else 1
        return self._cut(image, rng if view >= num_kinds else None, view % num_kinds == 1)

    def check_views(self, num_views: int) -> None:
        """Raise InputError if a cache of `num_views` views would repeat a view or lack the mirrored one."""
        num_kinds = 2 if self.flip else 1
        is_right = num_views == num_kinds if self.crop == "centre" else num_views % num_kinds == 0
        if num_views < 1 or not is_right:
            allowed = str(num_kinds) if self.crop == "centre" else f"a multiple of {num_kinds}"
            raise InputError(
                f"data.num_views must be {allowed} with data.flip={self.flip} and data.crop={self.crop}, "
                f"got {num_views}",
                field="data.num_views",
                given=num_views,
                expected=allowed,
            )

    def _cut(self, image, rng: np.random.Generator | None, is_mirrored: bool) -> np.ndarray:
        photo = _as_photo(image, self.upright, self.channels)
        if rng is None or self.crop == "centre":
            photo = _cut_square(*_shrink(photo, self.image_size), self.image_size)
        elif self.crop == "random":
            short_side = rng.integers(self.image_size, math.ceil(self.image_size / self.min_crop), endpoint=True)
            photo = _cut_square(*_shrink(photo, int(short_side)), self.image_size, rng)
        else:
            photo = _cut_resized(photo, self.image_size, self.min_crop, rng)
        pixels_YXC = pixels_of(photo)
        return np.ascontiguousarray(pixels_YXC[:, ::-1]) if is_mirrored else pixels_YXC


@dataclasses.dataclass(frozen=True)
class CoverTransform:
    """Cuts a photograph, encoded bytes or uint8 pixels, to uint8 [height, width, channels].

    The image is made as small as still covers this size, as `PhotoTransform` does for squares, and cut at its centre.

    upright: obey the camera's orientation tag. channels: 1 (grey), 3 (RGB) or 4 (RGBA).
    """

    height: int
    width: int
    upright: bool = True
    channels: int = 3

    def __call__(self, image: np.ndarray | bytes) -> np.ndarray:
        """Return the cropped image. Raises BadImage if the bytes hold no usable image."""
        photo = _as_photo(image, self.upright, self.channels)
        while photo.width >= 2 * self.width and photo.height >= 2 * self.height:
            photo = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BOX)
        ratio = max(self.width / photo.width, self.height / photo.height)
        size = max(self.width, round(photo.width * ratio)), max(self.height, round(photo.height * ratio))
        if size[0] * size[1] > MAX_PIXELS:
            raise BadImage(f"{photo.width} x {photo.height} pixels: too long and thin to cut the size from")
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        photo = photo.resize(size, Image.Resampling.BICUBIC)
        return pixels_of(photo.crop((left, top, left + self.width, top + self.height)))


def _as_photo(image: np.ndarray | bytes, upright: bool, channels: int) -> Image.Image:
    """Return a grey, RGB or RGBA image of bytes or pixels.

    Raises BadImage, or InputError if the pixels are not uint8.
    """
    if isinstance(image, bytes):
        return open_rgb(image, upright=upright, channels=channels)
    if image.dtype != np.uint8:
        words = f"image must have dtype uint8, got {image.dtype}"
        raise InputError(words, field="image", given=image.dtype, expected="uint8")
    return to_picture(image).convert(MODES[channels])


def _shrink(photo: Image.Image, short_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Return the image after ADM's box halving, and the size to which it is still to be resized."""
    while min(photo.size) >= 2 * short_side:
        photo = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BOX)
    ratio = short_side / min(photo.size)
    return photo, (round(photo.width * ratio), round(photo.height * ratio))


def _cut_square(photo, new_size: tuple[int, int], side: int, rng: np.random.Generator | None = None) -> Image.Image:
    """Return the square at the centre, or anywhere with an rng, of the image resized to `new_size`."""
    if new_size[0] * new_size[1] > MAX_PIXELS:
        raise BadImage(f"{photo.width} x {photo.height} pixels: too long and thin to cut a square from")
    spare_x, spare_y = new_size[0] - side, new_size[1] - side
    left, top = (spare_x // 2, spare_y // 2) if rng is None else rng.integers((spare_x + 1, spare_y + 1)).tolist()
    photo = photo.resize(new_size, Image.Resampling.BICUBIC)
    return photo.crop((left, top, left + side, top + side))


def _cut_resized(photo: Image.Image, side: int, min_area: float, rng: np.random.Generator) -> Image.Image:
    """Return a random share of the area as a square. A crop longer than the image is cut to the image."""
    area = rng.uniform(min_area, 1) * photo.width * photo.height
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(photo.width, max(1, round(math.sqrt(area * aspect))))
    height = min(photo.height, max(1, round(math.sqrt(area / aspect))))
    left, top = rng.integers((photo.width - width + 1, photo.height - height + 1)).tolist()
    box = (left, top, left + width, top + height)
    return photo.resize((side, side), Image.Resampling.BICUBIC, box=box)
