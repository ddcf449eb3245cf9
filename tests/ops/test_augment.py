"""Augmentation of what a discriminator sees."""

import jax.numpy as jnp
import loss_case
import numpy as np
import pytest

from mvar_jax.ops.augment import NUM_DRAWS, Pass, augment, draw_augmentations


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_same_numbers_give_the_images_of_a_plain_program(channels):
    x, draws = loss_case.augmented()
    golden = loss_case.load("augment")[str(channels)]
    np.testing.assert_allclose(augment(jnp.asarray(x[..., :channels]), jnp.asarray(draws)), golden, atol=1e-6)


def test_numbers_depend_on_sample_step_and_pass_but_not_on_the_batch():
    whole = draw_augmentations(3, jnp.arange(6), 7, Pass.REAL)
    assert whole.shape == (6, NUM_DRAWS)
    np.testing.assert_array_equal(draw_augmentations(3, jnp.array([4, 1]), 7, Pass.REAL), whole[jnp.array([4, 1])])
    others = [draw_augmentations(3, jnp.arange(6), 8, Pass.REAL), draw_augmentations(4, jnp.arange(6), 7, Pass.REAL)]
    others += [draw_augmentations(3, jnp.arange(6), 7, of) for of in (Pass.FAKE, Pass.GENERATOR)]
    assert all(not np.isclose(whole, other).any() for other in others)


def test_half_of_the_large_samples_are_cropped_and_the_others_averaged():
    draws = np.full((2, NUM_DRAWS), 0.5, np.float32)  # no shift and no other colours
    draws[:, 5:7] = 0  # the cut is at the corner
    draws[:, 7:] = [[0, 0.99, 0.5], [0.9, 0, 0]]
    x = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    plain = augment(jnp.asarray(x), jnp.asarray(draws))
    found = augment(jnp.asarray(x), jnp.asarray(draws), crop_side=20)
    np.testing.assert_allclose(found[0], plain[0, 20:, 10:30], atol=1e-6)
    np.testing.assert_allclose(found[1], plain[1].reshape(20, 2, 20, 2, 3).mean((1, 3)), atol=1e-6)
    np.testing.assert_array_equal(augment(jnp.asarray(x), jnp.asarray(draws), crop_side=40), plain)
