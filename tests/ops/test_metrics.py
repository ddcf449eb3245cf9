import eval_case
import jax
import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.ops import metrics


def test_psnr_is_exact_per_image():
    a_BYX3 = np.zeros((3, 4, 4, 3), np.uint8)
    b_BYX3 = a_BYX3.copy()
    b_BYX3[1] = 51
    b_BYX3[2, :2] = 255
    psnr_B = metrics.psnr(a_BYX3, b_BYX3, 255)
    np.testing.assert_allclose(psnr_B, [np.inf, 10 * np.log10(25), 10 * np.log10(2)], rtol=1e-14)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    rng = np.random.default_rng(4)
    a_BYX3 = rng.uniform(size=(2, 20, 16, 3))
    np.testing.assert_allclose(metrics.ssim(a_BYX3, a_BYX3, 1), 1, rtol=1e-12)
    noisy = [metrics.ssim(a_BYX3, a_BYX3 + s * rng.normal(size=a_BYX3.shape), 1).max() for s in (0.1, 0.5)]
    assert 1 > noisy[0] > noisy[1]


def test_ssim_of_flat_images_is_the_luminance_term():
    a_BYX3, b_BYX3 = np.full((1, 11, 11, 3), 0.2), np.full((1, 11, 11, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(a_BYX3, b_BYX3, 1), expected, rtol=1e-9)


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
    np.testing.assert_allclose(metrics.ssim(rgb(a_YX), rgb(b_YX), 1), expected, rtol=1e-9)


@pytest.mark.parametrize("size", ["64x64", "33x47"])
def test_psnr_and_ssim_equal_those_of_scikit_image(size):
    """Golden: `gaussian_weights, sigma=1.5, use_sample_covariance=False`. The images of the last pair are equal."""
    golden = eval_case.load("pixels.json")[size]
    a = eval_case.images(f"pixels/{size}", 4, *eval_case.sizes_of(size)).astype(int)
    b = (3 * a + np.roll(a, 1, 0)) // 4
    b[3] = a[3]
    np.testing.assert_allclose(metrics.psnr(a, b, 255), [float(x) for x in golden["psnr_uint8"]], rtol=1e-13)
    expected = golden["ssim_gaussian_skimage_uint8"]
    np.testing.assert_allclose(metrics.ssim(a, b, 255), expected, rtol=1e-12)
    in_program = jax.jit(lambda a, b: metrics.similarity(a, b, 255.0))(a.astype(np.float32), b.astype(np.float32))
    assert in_program.dtype == np.float32 and in_program[3] == 1
    np.testing.assert_allclose(in_program, expected, atol=5e-7)


def test_perplexity_counts_codes_that_are_hit_alike():
    assert metrics.perplexity(np.full(128, 7)) == pytest.approx(128)
    assert metrics.perplexity([0, 5, 0, 5]) == pytest.approx(2)
    assert metrics.perplexity([0, 9]) == pytest.approx(1)
    with pytest.raises(InputError):
        metrics.perplexity([0, 0])


def test_psnr_of_an_error_is_the_same_on_the_host_and_in_a_program():
    error_B = np.asarray([0.0, 1e-4, 0.3], np.float32)
    expected_B = [np.inf, 10 * np.log10(4 / 1e-4), 10 * np.log10(4 / 0.3)]
    on_host = metrics.psnr_of_error(error_B, 2)
    traced = jax.jit(lambda error: metrics.psnr_of_error(error, 2))(error_B)
    assert on_host.dtype == traced.dtype == np.float32
    np.testing.assert_allclose(on_host, expected_B, rtol=1e-6)
    np.testing.assert_allclose(traced, expected_B, rtol=1e-6)
