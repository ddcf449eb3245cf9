"""Figures that compare sets of images or of features. Host arithmetic: numpy and scipy, all in float64."""

import numpy as np
from scipy import linalg, ndimage
from scipy.spatial.distance import cdist

from mvar_jax.errors import InputError


def _factor(covariance_DD: np.ndarray) -> np.ndarray:
    """F with F F^T = covariance; rounding can leave eigenvalues just below zero, which are zero."""
    values_D, vectors_DD = linalg.eigh(covariance_DD)
    return vectors_DD * np.sqrt(np.clip(values_D, 0, None))


def frechet_distance_of_moments(mean_a_D, covariance_a_DD, mean_b_D, covariance_b_DD) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al., arXiv 1706.08500, equation 6).

    With covariances F F^T and G G^T the trace of sqrt(A B) is the sum of the singular values of F^T G: real
    and accurate for singular covariances, where a matrix square root of A B is not. Never negative.
    """
    mean_a_D, mean_b_D = np.asarray(mean_a_D, np.float64), np.asarray(mean_b_D, np.float64)
    a_DD, b_DD = np.asarray(covariance_a_DD, np.float64), np.asarray(covariance_b_DD, np.float64)
    trace_of_root = linalg.svdvals(_factor(a_DD).T @ _factor(b_DD)).sum()
    distance = ((mean_a_D - mean_b_D) ** 2).sum() + np.trace(a_DD) + np.trace(b_DD) - 2 * trace_of_root
    return max(0.0, float(distance))


def moments(features_ND) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D]. Raises InputError for fewer than two rows."""
    features_ND = np.asarray(features_ND, np.float64)
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise InputError("features", features_ND.shape, "[N, D] with at least 2 rows")
    return features_ND.mean(0), np.atleast_2d(np.cov(features_ND, rowvar=False))


def frechet_distance(features_a_ND, features_b_ND) -> float:
    """Frechet distance of two sets of features, in squared feature units; the sets may differ in size.

    Raises InputError for sets of different width or fewer than two rows.
    """
    moments_a, moments_b = moments(features_a_ND), moments(features_b_ND)
    if moments_a[0].shape != moments_b[0].shape:
        raise InputError("features", moments_b[0].shape, f"the other set's width {moments_a[0].shape}")
    return frechet_distance_of_moments(*moments_a, *moments_b)


def nearest_distances(queries_ND, references_MD, chunk: int = 256) -> np.ndarray:
    """Euclidean distance of every query to its nearest reference, [N]; `chunk` queries at a time."""
    queries_ND, references_MD = np.asarray(queries_ND, np.float64), np.asarray(references_MD, np.float64)
    if len(references_MD) == 0:
        raise InputError("references", references_MD.shape, "at least 1 row")
    starts = range(0, len(queries_ND), chunk)
    nearest = [cdist(queries_ND[start : start + chunk], references_MD).min(1) for start in starts]
    return np.concatenate(nearest) if nearest else np.zeros(0)


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
    mse_B = ((a_BYX3 - b_BYX3) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / mse_B)


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
