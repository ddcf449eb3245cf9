"""Statistics between two sets of features. Host arithmetic in float64."""

import warnings

import numpy as np
from scipy import linalg
from scipy.spatial.distance import cdist

from mvar_jax.errors import InputError
from mvar_jax.evaluation.moments import Moments, check_features


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


def frechet_distance(features_a_ND, features_b_ND) -> float:
    """Return the Frechet distance of two sets of features, in squared feature units; they may differ in size.

    Warns if a set has no more rows than features: its covariance is then singular and the distance too large to be
    compared with that of larger sets. Raises InputError if the sets differ in width, one has less than two rows, or a
    value is not finite.
    """
    sets = [check_features(x, min_rows=2) for x in (features_a_ND, features_b_ND)]
    expected, given = (x.shape[1] for x in sets)
    if expected != given:
        message = f"features of both sets must have the same width, got {expected} and {given}"
        raise InputError(message, field="features", given=given, expected=str(expected))
    num_rows = min(map(len, sets))
    if num_rows <= given:
        message = f"a Frechet distance of {num_rows} rows of {given} features is too large; take {given + 1} or more"
        warnings.warn(message, stacklevel=2)
    a, b = map(Moments.of, sets)
    return frechet_distance_of_moments(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)


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
