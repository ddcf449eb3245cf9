"""From images in [-1, 1] to the 256 levels of a file, the same on the host and inside a program."""

import jax
import numpy as np


def to_levels(images: jax.Array | np.ndarray, truncate: bool = False) -> jax.Array | np.ndarray:
    """Float32 images in [-1, 1] (clipped to it) as uint8 of the same kind of array, rounded to nearest.

    `truncate` rounds down, as the published programs do: for scores that are compared with theirs.
    """
    xp = images.__array_namespace__()
    levels = (xp.clip(images, -1, 1) + 1) * 127.5
    return (levels if truncate else xp.rint(levels)).astype(xp.uint8)
