import warnings

import numpy as np
import pytest

from mvar_jax.digits import judge
from mvar_jax.errors import InputError
from mvar_jax.evaluation import statistics
from mvar_jax.evaluation.moments import Moments


@pytest.fixture(scope="module")
def digits():
    """Training and held-out images [-1, 1] of 32 x 32 pixels, with labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32).repeat(4, axis=1).repeat(4, axis=2)
    images = np.repeat(images[..., None], 3, axis=3)
    is_heldout = np.arange(len(images)) % 5 == 0
    return images[~is_heldout], data.target[~is_heldout], images[is_heldout], data.target[is_heldout]


def test_grid_is_the_box_average_of_grey_values_in_row_order():
    grey_YX = np.arange(64, dtype=np.float64).reshape(8, 8) / 64
    image = np.repeat(np.kron(grey_YX, np.ones((4, 4)))[None, :, :, None], 3, axis=3)
    image[..., 0] += 0.01
    image[..., 2] -= 0.01
    image[:, ::2] += 0.005
    image[:, 1::2] -= 0.005
    np.testing.assert_allclose(judge.reduce_to_grid(np.clip(image, 0, 1) * 2 - 1)[0, 1:], grey_YX.ravel()[1:])


def test_grid_of_uint8_and_of_floats_agree():
    levels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    floats = levels / 127.5 - 1
    np.testing.assert_allclose(judge.reduce_to_grid(levels), judge.reduce_to_grid(floats), atol=1e-12)


@pytest.mark.parametrize("images", [np.zeros((1, 20, 32, 3)), np.full((1, 32, 32, 3), 200.0), np.zeros((0, 8, 8, 3))])
def test_grid_refuses_other_sides_values_and_no_image(images):
    with pytest.raises(InputError):
        judge.reduce_to_grid(images)


def test_judge_recognises_heldout_digits_and_not_wrong_labels(digits):
    train, train_labels, heldout, labels = digits
    classifier = judge.train_judge(judge.reduce_to_grid(train), train_labels)
    assert judge.class_accuracy(classifier, heldout, labels) > 0.97
    assert judge.class_accuracy(classifier, heldout, (labels + 1) % 10) < 0.03


def test_hidden_layer_is_converged_deterministic_and_separates_noise_from_digits(digits):
    train, train_labels, heldout, _ = digits
    grid_NG = judge.reduce_to_grid(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space, again = (judge.hidden_layer_space(grid_NG, train_labels) for _ in range(2))
    features_ND = space(heldout)
    assert features_ND.shape == (len(heldout), 64) and features_ND.min() == 0
    np.testing.assert_array_equal(features_ND, again(heldout))
    noisy = np.clip(heldout + 0.5 * np.random.default_rng(0).normal(size=heldout.shape), -1, 1)
    real = statistics.frechet_distance(space(train), features_ND)
    assert statistics.frechet_distance(space(noisy), features_ND) > 3 * real


def test_principal_space_is_centred_and_uncorrelated_on_the_training_images(digits):
    train = digits[0]
    found = Moments.of(judge.principal_space(judge.reduce_to_grid(train))(train))
    mean_D, covariance_DD = found.mean_D, found.covariance_DD
    assert mean_D.shape == (32,)
    np.testing.assert_allclose(mean_D, 0, atol=1e-10)
    variance_D = np.diag(covariance_DD)
    np.testing.assert_allclose(covariance_DD, np.diag(variance_D), atol=1e-10)
    assert (np.diff(variance_D) <= 0).all() and variance_D[0] > 10 * variance_D[-1]
