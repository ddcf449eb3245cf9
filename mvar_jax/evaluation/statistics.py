"""Statistics between two sets of features. Host arithmetic in float64."""

import numpy as np
from scipy import linalg
from scipy.spatial.distance import cdist

from mvar_jax.errors import InputError


def _factor(covariance_DD: np.ndarray) -> np.ndarray:
    """Return F with F F^T = covariance; eigenvalues that rounding makes negative count as zero."""
    values_D, vectors_DD = linalg.eigh(covariance_DD)
    return vectors_DD * np.sqrt(np.clip(values_D, 0, None))


def frechet_distance_of_moments(mean_a_D, covariance_a_DD, mean_b_D, covariance_b_DD) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (Heusel et al., arXiv 1706.08500, equation 6).

    With covariances F F^T and G G^T, the trace of sqrt(A B) is the sum of the singular values of F^T G. It is real
    and accurate for singular covariances, unlike a matrix square root of A B. The distance is never negative.
    """
    mean_a_D, mean_b_D = np.asarray(mean_a_D, np.float64), np.asarray(mean_b_D, np.float64)
    a_DD, b_DD = np.asarray(covariance_a_DD, np.float64), np.asarray(covariance_b_DD, np.float64)
    trace_of_root = linalg.svdvals(_factor(a_DD).T @ _factor(b_DD)).sum()
    distance = ((mean_a_D - mean_b_D) ** 2).sum() + np.trace(a_DD) + np.trace(b_DD) - 2 * trace_of_root
    return max(0.0, float(distance))


def moments(features_ND) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean `[D]` and unbiased covariance `[D, D]`. Raises InputError if there are less than two rows."""
    features_ND = np.asarray(features_ND, np.float64)
    if features_ND.ndim != 2 or len(features_ND) < 2:
        given, expected = list(features_ND.shape), "[N, D] with at least 2 rows"
        message = f"features must have shape {expected}, got {given}"
        raise InputError(message, field="features", given=given, expected=expected)
    return features_ND.mean(0), np.atleast_2d(np.cov(features_ND, rowvar=False))


def frechet_distance(features_a_ND, features_b_ND) -> float:
    """Return the Frechet distance of two sets of features, in squared feature units; they may differ in size.

    Raises InputError if the sets differ in width or one has less than two rows.
    """
    moments_a, moments_b = moments(features_a_ND), moments(features_b_ND)
    if moments_a[0].shape != moments_b[0].shape:
        expected, given = (len(mean_D) for mean_D, _ in (moments_a, moments_b))
        message = f"features of both sets must have the same width, got {expected} and {given}"
        raise InputError(message, field="features", given=given, expected=str(expected))
    return frechet_distance_of_moments(*moments_a, *moments_b)


def nearest_distances(queries_ND, references_MD, chunk: int = 256) -> np.ndarray:
    """Return the Euclidean distance of each query to its nearest reference, `[N]`, computed in chunks of queries."""
    queries_ND, references_MD = np.asarray(queries_ND, np.float64), np.asarray(references_MD, np.float64)
    if len(references_MD) == 0:
        given = list(references_MD.shape)
        message = f"references must have at least 1 row, got shape {given}"
        raise InputError(message, field="references", given=given, expected="at least 1 row")
    starts = range(0, len(queries_ND), chunk)
    nearest = [cdist(queries_ND[start : start + chunk], references_MD).min(1) for start in starts]
    return np.concatenate(nearest) if nearest else np.zeros(0)
