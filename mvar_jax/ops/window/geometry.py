"""Positions of the windows: k keys per axis, shifted (not cut) at borders, so always exactly k x k keys."""

import functools

import numpy as np


def window_starts(length: int, kernel_size: int) -> np.ndarray:
    """Return the first key of each query's window along one axis, `[length] int`; needs kernel_size <= length."""
    return np.clip(np.arange(length) - kernel_size // 2, 0, length - kernel_size)


@functools.lru_cache(maxsize=64)
def window_indices(height: int, width: int, kernel_size: int) -> np.ndarray:
    """Return each query's key positions, row-major, `[Y*X, W*W] int32`; W is cut to the map's sides."""
    ky, kx = min(kernel_size, height), min(kernel_size, width)
    rows = window_starts(height, ky)[:, None] + np.arange(ky)
    columns = window_starts(width, kx)[:, None] + np.arange(kx)
    flat = rows[:, None, :, None] * width + columns[None, :, None, :]
    return flat.reshape(height * width, ky * kx).astype(np.int32)


@functools.lru_cache(maxsize=64)
def window_mask(height: int, width: int, kernel_size: int) -> np.ndarray:
    """Return `[Y*X, Y*X] bool`: true if the key is in the query's window."""
    mask = np.zeros((height * width, height * width), bool)
    np.put_along_axis(mask, window_indices(height, width, kernel_size), True, axis=1)
    return mask
