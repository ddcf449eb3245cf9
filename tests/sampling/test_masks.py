"""What a mask says, as an array and as an image file: the same pixels are drawn."""

import numpy as np
import pytest
from PIL import Image

from mvar_jax.data.decoding import read_values
from mvar_jax.errors import InputError
from mvar_jax.sampling.masks import check_mask

SIDE = 6
PART = np.zeros((SIDE, SIDE), bool)
PART[1:3, 2:5] = True  # what the painter of each mask means
PHOTO = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def paint(colour, ground) -> np.ndarray:
    """Return uint8 [Y, X, C]: one colour in PART, another elsewhere."""
    return np.where(PART[..., None], np.uint8(colour), np.uint8(ground))


HOLED = np.where(PART | (np.eye(SIDE) == 0), np.uint8(255), np.uint8(0))
GREY_PHOTO = PHOTO[..., :1].repeat(3, axis=2)
MASKS = {
    "white": paint([255], [0])[..., 0],
    "bool": PART,
    "zero and one": PART.astype(np.uint8),
    "one in RGB": paint([1] * 3, [0] * 3),
    "share": np.where(PART, np.float32(0.51), np.float32(0.49)),
    "half of 255": np.where(PART, np.uint8(128), np.uint8(127)),
    "sixteen bits": PART.astype(np.uint16) * 40_000,
    "one in sixteen bits": PART.astype(np.uint16),
    "red on black": paint([255, 0, 0], [0, 0, 0]),
    "red on white": paint([255, 0, 0], [255, 255, 255]),
    "red on a grey photo": np.where(PART[..., None], np.uint8([255, 0, 0]), GREY_PHOTO),
    "dark red": paint([128, 0, 0], [0, 0, 0]),
    "colours beside white": paint([0, 200, 0], [224] * 3),
    "alpha alone, black": paint([0, 0, 0, 255], [0, 0, 0, 0]),
    "alpha alone, white": paint([255, 255, 255, 255], [255, 255, 255, 0]),
    "alpha alone, grey": paint([0, 255], [0, 0]),
    "alpha zero and one": paint([0, 0, 0, 1], [0, 0, 0, 0]),
    "a red stroke on nothing": paint([255, 0, 0, 200], [0, 0, 0, 0]),
    "white over black paint, with alpha": np.dstack([paint([255] * 3, [0] * 3), HOLED]),
    "opaque": paint([255] * 4, [0, 0, 0, 255]),
    "half opaque everywhere": paint([255, 255, 255, 128], [0, 0, 0, 128]),
    "a hole in a photo": np.dstack([PHOTO, ~PART * np.uint8(255)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_draws_what_its_painter_means(name):
    mask = MASKS[name]
    np.testing.assert_array_equal(check_mask(mask, SIDE, SIDE)[0], PART)
    np.testing.assert_array_equal(check_mask(mask[None], SIDE, SIDE, invert=True)[0], ~PART)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "share"])
def test_a_mask_file_says_what_its_array_says(name, tmp_path):
    Image.fromarray(MASKS[name]).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(check_mask(read_values(tmp_path / "mask.png", "mask"), SIDE, SIDE)[0], PART)


def test_palettes_and_marked_transparency_are_read(tmp_path):
    """Modes of files that have no array of their own: a palette, a transparent colour, JPEG's noise."""
    palette = Image.fromarray(PART.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "hole.png", transparency=0)
    Image.fromarray(PART.astype(np.uint8) * 9).save(tmp_path / "grey.png", transparency=0)
    large = MASKS["red on white"].repeat(16, 0).repeat(16, 1)
    Image.fromarray(large).save(tmp_path / "stroke.jpg", quality=75)
    for name in ("palette.png", "hole.png", "grey.png"):
        np.testing.assert_array_equal(check_mask(read_values(tmp_path / name, "mask"), SIDE, SIDE)[0], PART, name)
    drawn = check_mask(read_values(tmp_path / "stroke.jpg", "mask"), *large.shape[:2])[0]
    assert (drawn == PART.repeat(16, 0).repeat(16, 1)).mean() > 0.98


def test_each_mask_of_a_batch_has_its_own_scale():
    both = np.stack([PART.astype(np.uint8), ~PART * np.uint8(255)])
    np.testing.assert_array_equal(check_mask(both, SIDE, SIDE), [PART, ~PART])


@pytest.mark.parametrize(
    ("mask", "invert", "message"),
    [
        ("white", False, "mask must be bool or numbers, got <U5$"),
        (np.ones((5, 6)), False, r"mask must have shape \[6, 6\] or \[B, 6, 6\], got \[5, 6\]$"),
        (np.ones(6), False, r"mask must have shape .*, got \[6\]$"),
        (np.ones((0, 6, 6)), False, r"mask must have shape .*, got \[0, 6, 6\]$"),
        (np.ones((6, 6, 5)), False, r"mask must have shape .*, got \[6, 6, 5\]$"),
        (np.zeros((6, 6)), False, "mask must mark some pixels to draw, .* above half, but marks none$"),
        (paint([100], [0])[..., 0], False, "mask must mark some pixels to draw"),
        (np.ones((6, 6)), False, "mask must leave some pixels as they are, .*; use sample instead$"),
        (np.zeros((6, 6)), True, "inverted mask must leave some pixels"),
        (np.full((6, 6), -1.0), False, "mask must be bool, or numbers from 0 to 1, 255 or 65535, got -1 to -1$"),
        (np.full((6, 6), np.nan), False, "mask must be .*, got nan to nan$"),
        (np.full((6, 6), 70_000), False, "mask must be .*, got 70000 to 70000$"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(mask, invert, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        check_mask(mask, SIDE, SIDE, invert)
    assert caught.value.field == "mask"
