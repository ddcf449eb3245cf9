"""Figures that compare sets of images or of features. Host arithmetic: numpy and scipy, all in float64."""

import numpy as np
from scipy import linalg
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
