"""Bytes of image files to RGB pictures. Whatever cannot be one is a BadImage, which the pipeline skips and lists."""

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, WebPImagePlugin  # noqa: F401 (importing it registers the format)

from mvar_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 2**26  # of a file, and of a crop before it is cut: 200 MB as RGB
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")

# sizes are checked below, before anything is decoded, and odd tags do no harm
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, in one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split())[:200])


def open_rgb(data: bytes, *, upright: bool = True) -> Image.Image:
    """The RGB picture that the bytes of a JPEG, PNG or WebP file hold.

    Grey, palette and CMYK pixels become RGB, transparency is dropped, 16 bits are scaled to 8. With `upright`
    the camera's orientation tag is obeyed; without it pixels stay as they lie in the file, as in ADM.

    Raises:
      BadImage: no such file, cut short, damaged, without pixels, or more than MAX_PIXELS of them.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if not 0 < picture.width * picture.height <= MAX_PIXELS:
            raise BadImage(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
        picture.load()
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's readers raise anything at all on damaged bytes
        raise BadImage(f"{type(error).__name__}: {error}") from None
    if upright:
        picture = _turn_upright(picture)
    return _to_rgb(picture)


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken tag says nothing about the pixels
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _SIXTEEN_BITS:  # Pillow's own conversion clips at 255
        pixels_YX = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((pixels_YX * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colours, without a warning
    return picture.convert("RGB")


def read_image(path: str | os.PathLike, field: str = "images") -> np.ndarray:
    """An image file as uint8 [Y, X, 3], upright. Raises InputError where it is none, or too large to be honest."""
    try:
        with open(path, "rb") as file:
            return np.asarray(open_rgb(file.read()))
    except (OSError, BadImage) as error:
        raise InputError(field, str(path), f"a readable image ({error})") from None
