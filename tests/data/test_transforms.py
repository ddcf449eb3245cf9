import math

import numpy as np
import pytest
from PIL import Image

from mvar_jax.data.sources import open_source
from mvar_jax.data.transforms import DigitTransform, PhotoTransform, PickView
from mvar_jax.errors import InputError


@pytest.fixture(scope="module")
def digits():
    source = open_source("digits", "train", size=40)
    return [source[i]["image"] for i in range(len(source))]


def _grey(pixels_YX3):
    return (pixels_YX3[..., 0] + 1) / 2


def _centroid(grey_YX):
    """Rows and columns from the image centre, in pixels."""
    places = np.arange(len(grey_YX)) - (len(grey_YX) - 1) / 2
    return np.array([grey_YX.sum(1) @ places, grey_YX.sum(0) @ places]) / grey_YX.sum()


def _blob(row=3.5, column=3.5, height=1.2, width=1.2):
    y, x = np.mgrid[:8, :8]
    return np.exp(-(((y - row) / height) ** 2) - ((x - column) / width) ** 2).astype(np.float32)


def test_digit_without_rng_keeps_mean_and_boxes_back_to_the_original(digits):
    for image in digits:
        pixels = DigitTransform()(image)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.float32
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
        grey = _grey(pixels)
        assert grey.mean() == pytest.approx(image.mean(), abs=0.01)
        boxed = grey.reshape(8, 4, 8, 4).mean((1, 3))
        assert np.sqrt(np.mean((boxed - image) ** 2)) < 0.09


def test_digit_without_rng_has_half_pixel_centres():
    assert np.allclose(_centroid(_grey(DigitTransform()(_blob()))), 0, atol=1e-4)
    centroid_px = _centroid(_grey(DigitTransform(image_size=16)(_blob(row=4.5, column=2.5))))
    assert np.allclose(centroid_px, [2, -2], atol=0.1)


def test_digit_stays_in_range_and_varies_with_the_rng(digits):
    pixels = [DigitTransform()(digits[0], np.random.default_rng(seed)) for seed in range(20)]
    assert min(p.min() for p in pixels) >= -1 and max(p.max() for p in pixels) <= 1
    assert len({p.tobytes() for p in pixels}) == 20
    assert np.array_equal(pixels[4], DigitTransform()(digits[0], np.random.default_rng(4)))


def test_digit_with_zero_amplitudes_ignores_the_rng(digits):
    still = DigitTransform(degrees=0, shift_px=0, scale=0, shear=0)
    assert np.allclose(still(digits[1], np.random.default_rng(0)), still(digits[1]), atol=1e-6)


def test_digit_shift_is_bounded_in_input_pixels_and_reaches_both_sides():
    transform = DigitTransform(degrees=0, shift_px=0.5, scale=0, shear=0)
    shifts = np.stack([_centroid(_grey(transform(_blob(), np.random.default_rng(seed)))) / 4 for seed in range(60)])
    assert np.abs(shifts).max() < 0.51
    assert np.all(shifts.max(0) > 0.4) and np.all(shifts.min(0) < -0.4)


def test_digit_rotation_is_bounded_in_degrees_and_reaches_both_sides():
    transform = DigitTransform(degrees=20, shift_px=0, scale=0, shear=0)
    angles = []
    for seed in range(60):
        grey = _grey(transform(_blob(height=2.0, width=0.8), np.random.default_rng(seed)))
        y, x = np.mgrid[:32, :32] - 15.5
        axes = np.linalg.eigh(np.cov(np.stack([y.ravel(), x.ravel()]), aweights=grey.ravel()))[1]
        angles.append(math.degrees(math.atan(axes[1, 1] / axes[0, 1])))
    assert max(np.abs(angles)) < 21
    assert max(angles) > 16 and min(angles) < -16


@pytest.mark.parametrize(("field", "value"), [("scale", 0.2), ("shear", 0.5)])
def test_digit_scale_changes_area_and_shear_keeps_it(field, value):
    amplitudes = {"degrees": 0, "shift_px": 0, "scale": 0, "shear": 0, field: value}
    transform = DigitTransform(**amplitudes)
    plain = transform(_blob())
    areas = [_grey(transform(_blob(), np.random.default_rng(seed))).sum() for seed in range(40)]
    ratios = np.array(areas) / _grey(plain).sum()
    if field == "scale":
        assert 0.62 < ratios.min() < 0.7 and 1.36 < ratios.max() < 1.46
    else:
        assert np.allclose(ratios, 1, atol=0.02)
        assert not np.allclose(transform(_blob(), np.random.default_rng(0)), plain, atol=0.05)


def test_digit_refuses_a_colour_image():
    with pytest.raises(InputError, match="image="):
        DigitTransform()(np.zeros((8, 8, 3), np.float32))


def _plain_adm_crop(image, side):
    """Independent of the transform: halve (even sides) by averaging, resize by Pillow, cut by slicing."""
    while min(image.shape[:2]) >= 2 * side:
        image = image.astype(int)
        image = (image[:, ::2] + image[:, 1::2] + 1) // 2  # columns, then rows, each rounded half up
        image = ((image[::2] + image[1::2] + 1) // 2).astype(np.uint8)
    ratio = side / min(image.shape[:2])
    height, width = round(image.shape[0] * ratio), round(image.shape[1] * ratio)
    image = np.array(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize("shape", [(48, 60, 3), (64, 64, 3), (90, 52, 3), (100, 260, 3), (20, 27, 3)])
def test_photo_crop_equals_a_plain_implementation(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = PhotoTransform(image_size=24, flip=True)(image)
    assert pixels.shape == (24, 24, 3) and pixels.dtype == np.float32
    assert np.array_equal(pixels, _plain_adm_crop(image, 24).astype(np.float32) / 127.5 - 1)


def test_photo_flip_mirrors_about_half_of_the_draws_and_none_without_flip_or_rng():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    straight = PhotoTransform(16, flip=True)(image)
    drawn = [PhotoTransform(16, flip=True)(image, np.random.default_rng(seed)) for seed in range(100)]
    num_flipped = sum(np.array_equal(pixels, straight[:, ::-1]) for pixels in drawn)
    assert num_flipped + sum(np.array_equal(pixels, straight) for pixels in drawn) == 100
    assert 30 < num_flipped < 70
    unflipped = PhotoTransform(16, flip=False)
    assert all(np.array_equal(unflipped(image, np.random.default_rng(seed)), straight) for seed in range(8))


def test_photo_maps_full_range_gives_grey_three_channels_and_refuses_floats():
    pixels = PhotoTransform(8, flip=False)(np.array([[0] * 8] * 4 + [[255] * 8] * 4, np.uint8))
    assert pixels.shape == (8, 8, 3) and pixels.min() == -1 and pixels.max() == 1
    with pytest.raises(InputError, match="image=.*float32.*uint8"):
        PhotoTransform(8, flip=False)(np.zeros((8, 8, 3), np.float32))


def test_pick_view_takes_the_first_without_rng_and_every_view_with_it():
    ids = np.arange(12).reshape(3, 4)
    assert np.array_equal(PickView()(ids), ids[0])
    picked = {tuple(PickView()(ids, np.random.default_rng(seed))) for seed in range(40)}
    assert picked == {tuple(row) for row in ids}
