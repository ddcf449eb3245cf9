import numpy as np
import pytest
from scipy import linalg

from mvar_jax.errors import InputError
from mvar_jax.evaluation import statistics


def standardised(rng, num, width):
    """Rows whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x_ND = rng.normal(size=(num, width))
    x_ND -= x_ND.mean(0)
    return x_ND @ np.linalg.inv(np.linalg.cholesky(np.cov(x_ND, rowvar=False))).T


def test_frechet_distance_equals_the_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    deviation_a, deviation_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    shift = np.array([1.0, -2.0, 0.0])
    a_ND = standardised(rng, 50, 3) * deviation_a
    b_ND = standardised(rng, 80, 3) * deviation_b + shift
    expected = (shift**2).sum() + ((deviation_a - deviation_b) ** 2).sum()
    assert statistics.frechet_distance(a_ND, b_ND) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_equals_the_matrix_square_root_form_on_random_features():
    rng = np.random.default_rng(1)
    a_ND = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    b_ND = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 0.3
    a_DD, b_DD = np.cov(a_ND, rowvar=False), np.cov(b_ND, rowvar=False)
    root = linalg.sqrtm(a_DD @ b_DD).real
    expected = ((a_ND.mean(0) - b_ND.mean(0)) ** 2).sum() + np.trace(a_DD + b_DD - 2 * root)
    assert statistics.frechet_distance(a_ND, b_ND) == pytest.approx(expected, rel=1e-8)


@pytest.mark.filterwarnings("ignore:a Frechet distance of 5 rows:UserWarning")
@pytest.mark.parametrize("num", [5, 100])
def test_frechet_distance_is_zero_for_equal_sets_even_when_singular(num):
    features_ND = np.random.default_rng(2).normal(size=(num, 20)) * 10
    features_ND[:, 3] = 0
    assert statistics.frechet_distance(features_ND, features_ND[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_real_and_exact_for_covariances_of_rank_one():
    line = np.linspace(-1, 1, 9)[:, None]
    a_ND, b_ND = line * np.array([[1.0, 0.0]]), line * np.array([[0.0, 2.0]])
    expected = 5 * line.var(ddof=1)  # orthogonal lines: nothing is shared, the traces add up
    assert statistics.frechet_distance(a_ND, b_ND) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_refuses_sets_of_different_width():
    with pytest.raises(InputError, match="^features of both sets must have the same width, got 3 and 2$"):
        statistics.frechet_distance(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(InputError, match="^features must be .* at least 2 rows, got float64 .1, 3.$"):
        statistics.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


def test_nearest_distances_do_not_depend_on_the_chunk():
    rng = np.random.default_rng(3)
    queries_ND, references_MD = rng.normal(size=(23, 4)), rng.normal(size=(17, 4))
    expected = np.sqrt(((queries_ND[:, None] - references_MD) ** 2).sum(-1)).min(1)
    for chunk in (5, 1000):
        np.testing.assert_allclose(statistics.nearest_distances(queries_ND, references_MD, chunk), expected)
    assert statistics.nearest_distances(references_MD, references_MD).max() == 0
