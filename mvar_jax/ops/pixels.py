"""Conversion between float images in [-1, 1] and the 256 levels of uint8 pixels.

Images are uint8 from the transform to the device; the program that uses them normalises them with `as_images`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> Pillow's name of such images


def to_levels(images: jax.Array | np.ndarray, truncate: bool = False) -> jax.Array | np.ndarray:
    """Return float32 images as uint8 of the same kind of array, on the host or in a program.

    Args:
      images: float32, any shape; values are clipped to [-1, 1].
      truncate: round down instead of to nearest, like the published programs, for scores compared with theirs.
    """
    xp = images.__array_namespace__()
    levels = (xp.clip(images, -1, 1) + 1) * 127.5
    return (levels if truncate else xp.rint(levels)).astype(xp.uint8)


def repeat_grey(images):
    """Return `[..., 3]` of `[..., 1]`, for networks that know colours alone; others as they are."""
    xp = images.__array_namespace__()
    return xp.concatenate([images] * 3, axis=-1) if images.shape[-1] == 1 else images


def check_scored(channels: int, field: str) -> None:
    """Raise InputError if images have alpha, which LPIPS and Inception do not know. field: what asks for a score."""
    if channels == 4:
        words = f"{field} needs a tokenizer of images of 1 or 3 channels, got 4; leave it out or use another model"
        raise InputError(words, field=field, given=4, expected="1 or 3 channels")


def from_levels(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 pixels as float32 in [-1, 1], on the host."""
    images = np.divide(pixels, np.float32(127.5), dtype=np.float32)
    images -= 1  # in place: memory traffic dominates at this size
    return images


def as_images(pixels: jax.Array) -> jax.Array:
    """Return uint8 pixels as float32 in [-1, 1], in a program, equal to `from_levels` in every bit.

    A table, because XLA rounds `pixels / 127.5 - 1` differently from program to program: it multiplies by the
    reciprocal and may contract the subtraction. An image would then get different tokens in different programs.
    """
    table = jnp.asarray(from_levels(np.arange(256, dtype=np.uint8)))
    return table.at[pixels].get(mode="promise_in_bounds")
