"""Images of any size: the square that the model sees, and its way back into the image."""

import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.sampling.squares import Square

SIDE = 6


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


def mask_of(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


LEFT = mask_of(SIDE, SIDE, 0, SIDE, 0, 2)


@pytest.mark.parametrize(
    ("size", "box", "square"),
    [
        ((6, 6), (0, 6, 0, 2), (0, 0, 6)),
        ((20, 50), (3, 9, 30, 36), (0, 23, 20)),
        ((20, 50), (3, 9, 0, 2), (0, 0, 20)),
        ((20, 50), (3, 9, 48, 50), (0, 30, 20)),
        ((50, 20), (0, 20, 0, 20), (0, 0, 20)),
        ((50, 20), (25, 45, 7, 9), (25, 0, 20)),
    ],
)
def test_the_largest_square_has_the_mask_in_its_middle(size, box, square):
    mask = mask_of(*size, *box)
    found = Square.around(noise(*size), mask, SIDE)
    assert (found.top, found.left, found.side) == square
    top, left, side = square
    assert mask[top : top + side, left : left + side].sum() == mask.sum()


def test_a_mask_larger_than_any_square_is_refused_with_both_sizes():
    words = "^mask must draw at most 20 x 20 pixels, the largest square in an image of 50 x 20 pixels, got 21 x 5"
    with pytest.raises(InputError, match=words) as caught:
        Square.around(noise(20, 50), mask_of(20, 50, 4, 9, 5, 26), SIDE)
    assert caught.value.field == "mask"


@pytest.mark.parametrize("size", [(SIDE, SIDE), (31, 20), (4, 5)])
def test_pixels_outside_the_mask_are_unchanged_bit_for_bit(size):
    image, mask = noise(*size), mask_of(*size, 1, 3, 2, 4)
    square = Square.around(image, mask, SIDE)
    before = image.copy()
    after = square.paste(noise(SIDE, SIDE, seed=1))
    np.testing.assert_array_equal(after[~mask], image[~mask])
    assert (after[mask] != image[mask]).all() and np.abs(after).max() <= 1
    np.testing.assert_array_equal(image, before)


def test_results_fade_in_inside_the_mask():
    before, result = noise(SIDE, SIDE), noise(SIDE, SIDE, seed=1)
    square = Square.around(before, LEFT, SIDE)
    hard, soft = (square.paste(result, border_px) for border_px in (0, 1))
    np.testing.assert_array_equal(hard[:, :2], result[:, :2])
    np.testing.assert_allclose(soft[:, 1], (before[:, 2] + result[:, 1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(soft[:, 0], result[:, 0])


def test_a_fade_is_measured_in_pixels_of_the_image():
    square = Square.around(np.full((60, 60, 3), -1, np.float32), mask_of(60, 60, 0, 60, 0, 30), SIDE)
    row = square.paste(np.ones((SIDE, SIDE, 3), np.float32), border_px=3)[30, :, 0]
    np.testing.assert_allclose(row[[30, 29, 28, 27, 26]], [-1, -0.5, 0, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (31, 20)])
def test_masked_pixels_do_not_reach_the_model(size):
    image, mask = noise(*size), mask_of(*size, 0, 4, 1, 4)
    other = np.where(mask[..., None], noise(*size, seed=1), image)
    known, same = (Square.around(pixels, mask, SIDE).known() for pixels in (image, other))
    np.testing.assert_array_equal(known[0], same[0])


def test_the_nearest_known_pixels_stand_in_for_masked_ones():
    image = noise(SIDE, SIDE)
    known, mask = Square.around(image, LEFT, SIDE).known()
    np.testing.assert_array_equal(known[:, 2:], image[:, 2:])
    np.testing.assert_array_equal(known[:, :2], image[:, 2:3].repeat(2, 1))
    np.testing.assert_array_equal(mask, LEFT)


def test_a_pixel_masked_in_part_is_masked_for_the_model():
    """A mask of one pixel of a large image is not lost, so what is pasted there was sampled for a masked pixel."""
    mask = Square.around(noise(60, 60), mask_of(60, 60, 35, 36, 12, 13), SIDE).known()[1]
    assert np.argwhere(mask).tolist() == [[3, 1]]


def test_what_the_model_returns_unchanged_comes_back_where_it_was():
    """Smooth images survive both resizes: a shifted or mirrored square would not."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-0.5, 0.9, 60), indexing="ij")
    image = np.stack([rows, columns, rows * columns], axis=-1).astype(np.float32)
    mask = mask_of(40, 60, 10, 30, 25, 45)
    square = Square.around(image, mask, 20)
    after = square.paste(square.view(image), border_px=0)
    assert np.abs(after - image).max() < 0.02
