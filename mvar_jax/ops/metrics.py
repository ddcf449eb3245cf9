"""Metrics of reconstructions and of codebook usage. Host arithmetic in float64, except `psnr_of_error`."""

import numpy as np
from scipy import ndimage

from mvar_jax.errors import InputError


def _image_pair(a_BYX3, b_BYX3) -> tuple[np.ndarray, np.ndarray]:
    a_BYX3, b_BYX3 = np.asarray(a_BYX3, np.float64), np.asarray(b_BYX3, np.float64)
    if a_BYX3.shape != b_BYX3.shape or a_BYX3.ndim != 4:
        raise InputError("images", f"{a_BYX3.shape} and {b_BYX3.shape}", "two equal shapes [B, Y, X, 3]")
    return a_BYX3, b_BYX3


def psnr(a_BYX3, b_BYX3, data_range: float) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, [B]: 10 log10(data_range^2 / mse); inf where equal.

    `data_range` is 255 for uint8 images and 2 for images in [-1, 1].
    """
    a_BYX3, b_BYX3 = _image_pair(a_BYX3, b_BYX3)
    return psnr_of_error(((a_BYX3 - b_BYX3) ** 2).mean((1, 2, 3)), data_range)


def psnr_of_error(mse, data_range: float):
    """Return the PSNR in dB of mean squared errors, a numpy or (also inside a program) a jax array; inf for 0."""
    xp = mse.__array_namespace__()
    with np.errstate(divide="ignore"):
        return 10 * xp.log10(data_range**2 / mse)


def ssim(a_BYX3, b_BYX3, data_range: float) -> np.ndarray:
    """Structural similarity of each image, [B] (Wang et al. 2004).

    11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03, mean over the channels and over the
    positions at which the window lies inside the image. Raises InputError for images smaller than 11 x 11.
    """
    a_BYX3, b_BYX3 = _image_pair(a_BYX3, b_BYX3)
    radius = 5
    if min(a_BYX3.shape[1:3]) <= 2 * radius:
        raise InputError("images", a_BYX3.shape, "at least 11 x 11 pixels")

    def average(x_BYX3):
        inside = slice(radius, -radius)
        return ndimage.gaussian_filter(x_BYX3, (0, 1.5, 1.5, 0), radius=radius)[:, inside, inside]

    mean_a, mean_b = average(a_BYX3), average(b_BYX3)
    variances = average(a_BYX3**2) + average(b_BYX3**2) - mean_a**2 - mean_b**2
    covariance = average(a_BYX3 * b_BYX3) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean((1, 2, 3))


def perplexity(counts_V) -> float:
    """Exponential of the entropy of the shares: V when all V codes are hit alike, 1 when one code is."""
    counts_V = np.asarray(counts_V, np.float64)
    if counts_V.ndim != 1 or not counts_V.sum() > 0:
        raise InputError("counts", counts_V.shape, "[V] with at least one hit")
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(np.exp(-(share_V * np.log(share_V)).sum()))
