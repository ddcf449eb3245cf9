"""Between images in [-1, 1] and the 256 levels of a file."""

import jax
import jax.numpy as jnp
import numpy as np


def to_levels(images: jax.Array | np.ndarray, truncate: bool = False) -> jax.Array | np.ndarray:
    """Float32 images in [-1, 1] (clipped to it) as uint8 of the same kind of array, on the host or in a program.

    Rounded to nearest; `truncate` rounds down, as the published programs do: for scores compared with theirs.
    """
    xp = images.__array_namespace__()
    levels = (xp.clip(images, -1, 1) + 1) * 127.5
    return (levels if truncate else xp.rint(levels)).astype(xp.uint8)


def from_levels(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1]."""
    images = np.divide(pixels, np.float32(127.5), dtype=np.float32)
    images -= 1  # in place: at this size it is memory that takes the time
    return images


def as_images(images: jax.Array) -> jax.Array:
    """In a program: uint8 pixels as `from_levels` gives them, to the last bit; images in [-1, 1] as they are.

    Images travel to the device as pixels: a quarter of the bytes.
    """
    if images.dtype != jnp.uint8:
        return images
    # looked up: XLA would multiply by the reciprocal and fuse the subtraction, which rounds otherwise
    table = jnp.asarray(from_levels(np.arange(256, dtype=np.uint8)))
    return table.at[images].get(mode="promise_in_bounds")
