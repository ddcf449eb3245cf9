"""The inception score (Salimans et al., arXiv 1606.03498) as the published evaluator takes it."""

import numpy as np
from scipy.special import rel_entr

from mvar_jax.errors import InputError
from mvar_jax.evaluation.moments import check_features
from mvar_jax.values import as_integer

TOLERANCE = 1e-3


def inception_score(probabilities_NK, split_size: int = 5000) -> float:
    """Return the mean over parts of exp(mean KL(p(y|x), p(y))), with 0 log 0 = 0, in float64.

    The parts are consecutive rows, so the score depends on the order: rows sorted by class score far lower. A shorter
    last part counts as much as the others.

    Args:
      probabilities_NK: a row for each image, as a softmax gives.
      split_size: rows of a part.

    Raises:
      InputError: a value is not between 0 and 1, or `split_size` is below 1.
    """
    probabilities_NK = check_features(probabilities_NK, "probabilities")
    size = as_integer(split_size, "split_size", 1)
    starts = range(0, len(probabilities_NK), size)
    return float(np.mean([_score_of_part(probabilities_NK, i, i + size) for i in starts]))


def _score_of_part(probabilities_NK: np.ndarray, begin: int, end: int) -> float:
    p_nK = probabilities_NK[begin:end].astype(np.float64)
    is_bad_n = ((p_nK < 0) | (p_nK > 1 + TOLERANCE)).any(1)
    if is_bad_n.any():
        row = int(is_bad_n.argmax())
        given, expected = (float(p_nK[row].min()), float(p_nK[row].max())), "between 0 and 1"
        message = f"probabilities must be {expected}, got {given[0]:.4g} to {given[1]:.4g} in row {begin + row}"
        raise InputError(message, field="probabilities", given=given, expected=expected)
    return float(np.exp(rel_entr(p_nK, p_nK.mean(0)).sum(1).mean()))
