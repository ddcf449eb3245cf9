import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.pixels import as_images, from_levels, to_levels

LEVELS = np.arange(256, dtype=np.uint8)


def test_levels_come_back_from_images():
    images = from_levels(LEVELS)
    assert images.dtype == np.float32 and images[0] == -1 and images[255] == 1
    assert (to_levels(images) == LEVELS).all()


def test_a_program_makes_of_pixels_what_the_host_makes_to_the_last_bit():
    np.testing.assert_array_equal(jax.jit(as_images)(LEVELS), from_levels(LEVELS), strict=True)


def test_images_are_left_alone():
    images = jnp.ones((2, 2))
    assert as_images(images) is images
