"""The square of an image that a model edits, for images of any size, and its way back into the image."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from mvar_jax.errors import InputError
from mvar_jax.ops.resize import area_matrix
from mvar_jax.sampling.editing import SOFTNESS, check_border


@dataclasses.dataclass(frozen=True)
class Square:
    """An image, its mask, and the largest square around the mask, which the model sees in its own size.

    Outside the mask the image keeps its pixels, bit for bit. Inside it is (1 - a) * known + a * result: `known` is
    the nearest known pixel, `result` is resized to the square's side by a cubic kernel (not if the sizes are equal),
    and a = min(1, d / (border_px + 1)), where d is the distance to the nearest known pixel, in pixels of the image.
    If border_px is 0, the whole mask is `result`.

    Attributes:
      image_YX3: float32 in [-1, 1], any size.
      mask_YX: bool, True where to draw.
      top, left, side: of the square, in pixels of the image.
      model_side: side of the model's images.
    """

    image_YX3: np.ndarray
    mask_YX: np.ndarray
    top: int
    left: int
    side: int
    model_side: int

    @classmethod
    def around(cls, image_YX3: np.ndarray, mask_YX: np.ndarray, model_side: int) -> "Square":
        """Return the largest square of the image, placed so that the mask is in it and as central as possible.

        Raises InputError if the mask is higher or wider than any square in the image.
        """
        spans = [np.flatnonzero(mask_YX.any(axis=axis))[[0, -1]] + [0, 1] for axis in (1, 0)]
        (height, width), side = mask_YX.shape, min(mask_YX.shape)
        drawn_height, drawn_width = (int(end - first) for first, end in spans)
        if max(drawn_height, drawn_width) > side:
            given, expected = f"{drawn_width} x {drawn_height} pixels", f"at most {side} x {side} pixels"
            message = (
                f"mask must draw {expected}, the largest square in an image of {width} x {height} pixels, "
                f"got {given}; draw it in smaller parts, one after another"
            )
            raise InputError(message, field="mask", given=given, expected=expected)
        lengths = zip(spans, (height, width), strict=True)
        begins = [int(np.clip((first + end - side) // 2, 0, length - side)) for (first, end), length in lengths]
        return cls(image_YX3, mask_YX, *begins, side, model_side)

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what the model sees: (image `[Y, X, 3] float32`, mask `[Y, X] bool`), both of the model's size.

        Masked pixels are replaced by the nearest known ones before the resize, so they do not reach the model. A
        pixel that is masked in part counts as masked.
        """
        share = area_matrix(self.side, self.model_side)
        mask_YX = share @ self.mask_YX[self._inside].astype(np.float32) @ share.T > 0
        return _resize(self._filled_YX3[self._inside], self.model_side), mask_YX

    def paste(self, result_YX3: np.ndarray, border_px: int | None = None) -> np.ndarray:
        """Return the whole image with a result of the model's size in its mask. border_px: see `check_border`."""
        border_px = check_border(border_px, SOFTNESS, self.side)
        mask_YX = self.mask_YX[self._inside]
        share_YX1 = np.minimum(1, self._nearest[0][self._inside] / (border_px + 1)).astype(np.float32)[..., None]
        result_YX3 = _resize(np.asarray(result_YX3), self.side)
        image_YX3 = np.array(self._filled_YX3)
        known_YX3 = image_YX3[self._inside]
        blended_YX3 = (1 - share_YX1) * known_YX3 + share_YX1 * result_YX3
        image_YX3[self._inside] = np.where(mask_YX[..., None], blended_YX3, known_YX3)
        return image_YX3

    def view(self, image_YX3: np.ndarray) -> np.ndarray:
        """Return the square of an image of the whole size, resized to the model's size."""
        return _resize(image_YX3[self._inside], self.model_side)

    @property
    def _inside(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)

    @functools.cached_property
    def _nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """The distance of each pixel to the nearest known one, `[Y, X]`, and its place, `[2, Y, X]`."""
        from scipy import ndimage  # slow to import

        return ndimage.distance_transform_edt(self.mask_YX, return_indices=True)

    @functools.cached_property
    def _filled_YX3(self) -> np.ndarray:
        """The image with each masked pixel replaced by the nearest known one; known pixels are unchanged."""
        return self.image_YX3[tuple(self._nearest[1])]


def _resize(image_YX3: np.ndarray, side: int) -> np.ndarray:
    """Resize a square image in [-1, 1] by a cubic kernel, antialiased if it shrinks; float32, unchanged if equal."""
    if len(image_YX3) == side:
        return image_YX3
    planes = [Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in np.moveaxis(image_YX3, -1, 0)]
    resized = [np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized, axis=-1).clip(-1, 1)
