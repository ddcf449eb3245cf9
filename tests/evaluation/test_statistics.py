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
    with pytest.raises(InputError, match="width"):
        statistics.frechet_distance(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(InputError, match="at least 2 rows"):
        statistics.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


def test_nearest_distances_do_not_depend_on_the_chunk():
    rng = np.random.default_rng(3)
    queries_ND, references_MD = rng.normal(size=(23, 4)), rng.normal(size=(17, 4))
    expected = np.sqrt(((queries_ND[:, None] - references_MD) ** 2).sum(-1)).min(1)
    for chunk in (5, 1000):
        np.testing.assert_allclose(statistics.nearest_distances(queries_ND, references_MD, chunk), expected)
    assert statistics.nearest_distances(references_MD, references_MD).max() == 0


def test_psnr_is_exact_per_image():
    a_BYX3 = np.zeros((3, 4, 4, 3), np.uint8)
    b_BYX3 = a_BYX3.copy()
    b_BYX3[1] = 51
    b_BYX3[2, :2] = 255
    psnr_B = statistics.psnr(a_BYX3, b_BYX3, 255)
    np.testing.assert_allclose(psnr_B, [np.inf, 10 * np.log10(25), 10 * np.log10(2)], rtol=1e-14)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    rng = np.random.default_rng(4)
    a_BYX3 = rng.uniform(size=(2, 20, 16, 3))
    np.testing.assert_allclose(statistics.ssim(a_BYX3, a_BYX3, 1), 1, rtol=1e-12)
    noisy = [statistics.ssim(a_BYX3, a_BYX3 + s * rng.normal(size=a_BYX3.shape), 1).max() for s in (0.1, 0.5)]
    assert 1 > noisy[0] > noisy[1]


def test_ssim_of_flat_images_is_the_luminance_term():
    a_BYX3, b_BYX3 = np.full((1, 11, 11, 3), 0.2), np.full((1, 11, 11, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(statistics.ssim(a_BYX3, b_BYX3, 1), expected, rtol=1e-9)


def test_ssim_equals_the_definition_at_the_single_position_of_an_11_pixel_image():
    rng = np.random.default_rng(5)
    a_YX, b_YX = rng.uniform(size=(2, 11, 11))
    tap = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight_YX = np.outer(tap, tap) / tap.sum() ** 2
    mean_a, mean_b = (weight_YX * a_YX).sum(), (weight_YX * b_YX).sum()
    variance_a, variance_b = ((weight_YX * (x - m) ** 2).sum() for x, m in ((a_YX, mean_a), (b_YX, mean_b)))
    covariance = (weight_YX * (a_YX - mean_a) * (b_YX - mean_b)).sum()
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)
    rgb = lambda x_YX: np.repeat(x_YX[None, :, :, None], 3, axis=3)
    np.testing.assert_allclose(statistics.ssim(rgb(a_YX), rgb(b_YX), 1), expected, rtol=1e-9)


def test_perplexity_counts_codes_that_are_hit_alike():
    assert statistics.perplexity(np.full(128, 7)) == pytest.approx(128)
    assert statistics.perplexity([0, 5, 0, 5]) == pytest.approx(2)
    assert statistics.perplexity([0, 9]) == pytest.approx(1)
    with pytest.raises(InputError):
        statistics.perplexity([0, 0])
