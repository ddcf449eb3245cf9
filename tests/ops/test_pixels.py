import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvar_jax.ops.pixels import as_images, from_levels, to_levels

LEVELS = np.arange(256, dtype=np.uint8)


def test_levels_come_back_from_images():
    images = from_levels(LEVELS)
    assert images.dtype == np.float32 and images[0] == -1 and images[255] == 1
    assert (to_levels(images) == LEVELS).all()


def test_program_and_host_normalise_pixels_to_the_same_bits():
    np.testing.assert_array_equal(jax.jit(as_images)(LEVELS), from_levels(LEVELS), strict=True)


def test_plain_formula_in_a_program_misses_the_bits_of_the_host():
    """Why `as_images` is a table. If this fails, XLA divides and subtracts exactly, and the table can go."""
    plain = jax.jit(lambda pixels: pixels.astype(jnp.float32) / 127.5 - 1)(LEVELS)
    error = np.abs(plain - from_levels(LEVELS))
    assert 0 < error.max() < 2e-7


def test_floats_are_refused():
    with pytest.raises(TypeError, match="Indexer must have integer"):
        as_images(jnp.ones((2, 2)))
