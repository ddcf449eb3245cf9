"""Metrics of reconstructions and of codebook usage, in float64 on the host (`psnr_of_error`: in any program)."""

import numpy as np

from mvar_jax.errors import InputError


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
    """Return the structural similarity of each image, `[B] float64` (Wang et al. 2004).

    Gaussian window of 11 x 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03; mean over the channels and over the
    positions at which the window is inside the image. Raises InputError for images smaller than 11 x 11.
    """
    from scipy import ndimage  # slow to import

    a_BYX3, b_BYX3 = _image_pair(a_BYX3, b_BYX3)
    radius = 5
    if min(a_BYX3.shape[1:3]) <= 2 * radius:
        message = f"images must have at least 11 x 11 pixels for SSIM, got shape {list(a_BYX3.shape)}"
        raise InputError(message, field="images", given=a_BYX3.shape, expected="at least 11 x 11 pixels")

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
    """Return the exponential of the entropy of the shares: V if all V codes are hit equally, 1 if only one is hit."""
    counts_V = np.asarray(counts_V, np.float64)
    if counts_V.ndim != 1 or not counts_V.sum() > 0:
        message = f"counts must be [V] with at least one hit, got shape {list(counts_V.shape)}"
        raise InputError(message, field="counts", given=counts_V.shape, expected="[V] with at least one hit")
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(np.exp(-(share_V * np.log(share_V)).sum()))
