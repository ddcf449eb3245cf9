"""Metrics of reconstructions and of codebook usage, in float64 on the host.

`psnr_of_error`, `similarity`, `usage_percent` and `perplexities` also run in a program.
"""

import functools

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.ops.precision import EXACT, computing

SSIM_WINDOW = 11  # side in pixels
MARGIN = 0.08  # share of the mean number of hits from which a code counts as used


def _image_pair(a_BYX3, b_BYX3) -> tuple[np.ndarray, np.ndarray]:
    a_BYX3, b_BYX3 = np.asarray(a_BYX3, np.float64), np.asarray(b_BYX3, np.float64)
    if a_BYX3.shape != b_BYX3.shape or a_BYX3.ndim != 4:
        given, expected = (a_BYX3.shape, b_BYX3.shape), "equal shapes [B, Y, X, 3]"
        message = f"images must have {expected}, got {list(a_BYX3.shape)} and {list(b_BYX3.shape)}"
        raise InputError(message, field="images", given=given, expected=expected)
    return a_BYX3, b_BYX3


def psnr(a_BYX3, b_BYX3, data_range: float) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each image in dB, `[B] float64`; inf for equal images.

    data_range: 255 for uint8 images, 2 for images in [-1, 1].
    """
    a_BYX3, b_BYX3 = _image_pair(a_BYX3, b_BYX3)
    return psnr_of_error(((a_BYX3 - b_BYX3) ** 2).mean((1, 2, 3)), data_range)


def psnr_of_error(mse, data_range: float):
    """Return 10 log10(data_range^2 / mse) in dB of numpy or jax arrays; inf for an error of 0."""
    xp = mse.__array_namespace__()
    with np.errstate(divide="ignore"):
        return 10 * xp.log10(data_range**2 / mse)


def ssim(a_BYX3, b_BYX3, data_range: float) -> np.ndarray:
    """Return the structural similarity of each image, `[B] float64`; see `similarity`.

    Raises InputError for images smaller than 11 x 11.
    """
    a_BYX3, b_BYX3 = _image_pair(a_BYX3, b_BYX3)
    if min(a_BYX3.shape[1:3]) < SSIM_WINDOW:
        message = f"images must have at least 11 x 11 pixels for SSIM, got shape {list(a_BYX3.shape)}"
        raise InputError(message, field="images", given=a_BYX3.shape, expected="at least 11 x 11 pixels")
    return similarity(a_BYX3, b_BYX3, data_range)


def similarity(a_BYX3, b_BYX3, data_range: float):
    """Return the structural similarity of each image, `[B]`, of numpy or jax arrays of floats (Wang et al. 2004).

    Gaussian window of 11 x 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03; mean over the channels and over the
    positions at which the window is inside the image. Written with the moments of the difference, since those of
    similar images would cancel: float32 is then within 1e-6 of float64.
    """
    xp = a_BYX3.__array_namespace__()
    rows, columns = (xp.asarray(_gaussian_rows(size), dtype=a_BYX3.dtype) for size in a_BYX3.shape[1:3])

    def average(x_BYX3):
        with computing(EXACT):
            return rows @ xp.permute_dims(x_BYX3, (0, 3, 1, 2)) @ columns.T

    shift_B111 = a_BYX3.mean((1, 2, 3), keepdims=True)
    a, b = a_BYX3 - shift_B111, b_BYX3 - shift_B111
    mean_a, mean_b = average(a), average(b)
    difference = mean_a - mean_b
    variances = average(a**2 + b**2) - mean_a**2 - mean_b**2
    variance_of_difference = average((a - b) ** 2) - difference**2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = 1 - difference**2 / ((mean_a + shift_B111) ** 2 + (mean_b + shift_B111) ** 2 + c1)
    return (luminance * (1 - variance_of_difference / (variances + c2))).mean((1, 2, 3))


@functools.lru_cache(maxsize=8)
def _gaussian_rows(size: int) -> np.ndarray:
    """Return the matrix `[size - 10, size]` of the weighted means of 11 neighbors."""
    taps = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / 1.5) ** 2)
    matrix = np.zeros((size - SSIM_WINDOW + 1, size))
    for row in range(len(matrix)):
        matrix[row, row : row + SSIM_WINDOW] = taps / taps.sum()
    return matrix


def perplexity(counts_V) -> float:
    """Return the exponential of the entropy of the shares: V if all V codes are hit equally, 1 if only one is hit."""
    counts_V = np.asarray(counts_V, np.float64)
    if counts_V.ndim != 1 or not counts_V.sum() > 0:
        message = f"counts must be [V] with at least one hit, got shape {list(counts_V.shape)}"
        raise InputError(message, field="counts", given=counts_V.shape, expected="[V] with at least one hit")
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(np.exp(-(share_V * np.log(share_V)).sum()))


def usage_percent(hits_SV, num_tokens):
    """Return the percentage of codes with at least MARGIN * num_tokens / V hits, `[S]` of numpy or jax arrays.

    num_tokens: a number, for one margin of all scales, or `[S]`, the tokens of each scale, for its own margin. A
    scale of n tokens cannot reach more than n / (MARGIN * num_tokens) of the codes.
    """
    xp = hits_SV.__array_namespace__()
    margin_S = xp.asarray(MARGIN * num_tokens / hits_SV.shape[-1], dtype=xp.float32)
    return 100 * xp.mean(hits_SV >= margin_S[..., None], axis=-1)


def perplexities(hits_SV):
    """Return `perplexity` of each row, `[S]` of numpy or jax arrays of floats; 1 for a row without hits."""
    xp = hits_SV.__array_namespace__()
    share_SV = hits_SV / xp.maximum(hits_SV.sum(-1), xp.finfo(hits_SV.dtype).tiny)[..., None]
    return xp.exp(-xp.where(share_SV > 0, share_SV * xp.log(xp.where(share_SV > 0, share_SV, 1)), 0).sum(-1))
