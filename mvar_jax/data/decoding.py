"""From bytes of an image file to RGB pixels. What cannot be decoded is a BadImage, which the pipeline skips."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (importing registers the format)

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path
from mvar_jax.ops.pixels import MODES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2**26  # of a file, and of a crop before it is cut: 200 MB as RGB
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")
_BETWEEN = {"LAB": "RGB", "La": "LA", "RGBa": "RGBA"}  # modes that Pillow converts to grey by another alone
_BITS_TAG, _PHOTOMETRIC_TAG, _FORMAT_TAG = 258, 262, 339  # of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, in one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split())[:200])


def open_image(data: bytes, *, upright: bool = True) -> Image.Image:
    """Decode the bytes of a JPEG, PNG, WebP, BMP, GIF or TIFF file; of several frames the first.

    Args:
      upright: obey the camera's orientation tag. If False, pixels keep the order of the file, as in ADM.

    Raises:
      BadImage: the bytes are no such file, cut short or damaged, hold no pixels or more than MAX_PIXELS, or pixels
        whose range nobody knows (32 bits, floats).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
        is_negative = _is_negative(image)  # by tags that a turned image has no longer
        image = _turn_upright(image) if upright else image
        return Image.fromarray(65535 - np.asarray(image)) if is_negative else image
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's readers raise anything at all on damaged bytes
        raise BadImage(f"{type(error).__name__}: {error}") from None


def open_rgb(data: bytes, *, upright: bool = True, channels: int = 3) -> Image.Image:
    """Decode the bytes of an image file to an RGB image, or one of other `channels`; see `open_image`.

    Grey, palette and CMYK pixels become RGB, transparency is dropped unless there are 4 channels, 16 bits are scaled
    to 8.
    """
    return _to_mode(open_image(data, upright=upright), MODES[channels])


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken tag does not mean broken pixels
        return image


def _is_negative(image: Image.Image) -> bool:
    """Return whether 16-bit greys have 0 as white. Raises BadImage if nobody knows which value is white."""
    if image.mode not in (*_SIXTEEN_BITS, "F"):
        return False
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    num_bits, number_format = tags.get(_BITS_TAG, (16,))[0], tags.get(_FORMAT_TAG, (_UNSIGNED,))[0]
    if image.mode == "F" or num_bits != 16 or number_format != _UNSIGNED:
        raise BadImage(f"pixels of {num_bits} bits in mode {image.mode}, of which nobody knows what is white")
    return tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO


def has_visible_alpha(image: Image.Image) -> bool:
    """Return whether an image has pixels that are not opaque; decodes it if it has alpha at all."""
    if not (image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info):
        return False
    return image.convert(_BETWEEN.get(image.mode, "RGBA")).getchannel("A").getextrema()[0] < 255


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:  # Pillow's own conversion clips at 255
        pixels_YX = np.asarray(image).astype(np.int64)
        grey_YX = ((pixels_YX * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey_YX).convert(mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without a warning
    image = image.convert(_BETWEEN.get(image.mode, image.mode))
    try:
        return image.convert(mode)
    except ValueError as error:
        raise BadImage(str(error)) from None


def read_image(path: str | os.PathLike, field: str = "images", channels: int = 3) -> np.ndarray:
    """Return an image file as uint8 [Y, X, channels], upright.

    Args:
      field: name of the option that gave the path, for the error.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
      InputError: the file is missing, is not an image or exceeds MAX_PIXELS.
    """
    return pixels_of(_read(path, field, MODES[channels]))


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return the pixels of a grey, RGB or RGBA image, `[Y, X, C] uint8`."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def read_values(path: str | os.PathLike, field: str) -> np.ndarray:
    """Return an image file's own values, upright: `[Y, X]` if grey, else `[Y, X, C]`; the last of 2 or 4 is alpha.

    Palette colours become RGB, other colour spaces too. Raises as `read_image`.
    """
    image = _read(path, field)
    has_alpha = image.mode in ("PA", "RGBa") or "transparency" in image.info
    if image.mode in ("1", "L", "LA", "La"):
        image = image.convert("LA") if has_alpha or image.mode == "La" else image
    elif image.mode not in (*_SIXTEEN_BITS, "F", "RGBA"):
        image = image.convert("RGBA" if has_alpha else "RGB")
    return np.asarray(image)


def _read(path: str | os.PathLike, field: str, mode: str | None = None) -> Image.Image:
    try:
        image = open_image(as_path(path, field).read_bytes())
        return image if mode is None else _to_mode(image, mode)
    except (OSError, BadImage) as error:
        expected = "a readable image"
        message = f"--{field} must be {expected}, got {str(path)!r} ({shorten(error)})"
        raise InputError(message, field=field, given=str(path), expected=expected) from None
