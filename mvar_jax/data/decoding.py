"""From bytes of an image file to RGB pixels. What cannot be decoded is a BadImage, which the pipeline skips."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, WebPImagePlugin  # noqa: F401 (importing it registers the format)

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 2**26  # of a file, and of a crop before it is cut: 200 MB as RGB
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, in one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split())[:200])


def open_image(data: bytes, *, upright: bool = True) -> Image.Image:
    """Decode the bytes of a JPEG, PNG or WebP file.

    Args:
      upright: obey the camera's orientation tag. If False, pixels keep the order of the file, as in ADM.

    Raises:
      BadImage: the bytes are no such file, cut short or damaged, or hold no pixels or more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        image.load()
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's readers raise anything at all on damaged bytes
        raise BadImage(f"{type(error).__name__}: {error}") from None
    return _turn_upright(image) if upright else image


def open_rgb(data: bytes, *, upright: bool = True) -> Image.Image:
    """Decode the bytes of an image file to an RGB image; see `open_image`.

    Grey, palette and CMYK pixels become RGB, transparency is dropped, 16 bits are scaled to 8.
    """
    return _to_rgb(open_image(data, upright=upright))


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken tag does not mean broken pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:  # Pillow's own conversion clips at 255
        pixels_YX = np.asarray(image).astype(np.int64)
        return Image.fromarray(((pixels_YX * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without a warning
    return image.convert("RGB")


def read_image(path: str | os.PathLike, field: str = "images") -> np.ndarray:
    """Return an image file as uint8 [Y, X, 3], upright.

    Args:
      field: name of the option that gave the path, for the error.

    Raises:
      InputError: the file is missing, is not an image or exceeds MAX_PIXELS.
    """
    return np.asarray(_to_rgb(_read(path, field)))


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


def _read(path: str | os.PathLike, field: str) -> Image.Image:
    try:
        return open_image(as_path(path, field).read_bytes())
    except (OSError, BadImage) as error:
        expected = "a readable image"
        message = f"--{field} must be {expected}, got {str(path)!r} ({shorten(error)})"
        raise InputError(message, field=field, given=str(path), expected=expected) from None
