import io
import math

import numpy as np
import pytest
from image_files import encode, noise
from PIL import Image

from mvar_jax.data.sources import open_source
from mvar_jax.data.transforms import DigitTransform, PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.tokens.cache_reader import pick_views


@pytest.fixture(scope="module")
def digits():
    source = open_source("digits", "train", size=40)
    return [source[i]["image"] for i in range(len(source))]


def _grey(pixels_YX3):
    return pixels_YX3[..., 0] / 255


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
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
        grey = _grey(pixels)
        assert grey.mean() == pytest.approx(image.mean(), abs=0.01)
        boxed = grey.reshape(8, 4, 8, 4).mean((1, 3))
        assert np.sqrt(np.mean((boxed - image) ** 2)) < 0.09


def test_digit_is_rounded_to_the_nearest_level(digits):
    """At its own size without an rng the spline meets every pixel."""
    pixels = DigitTransform(image_size=8)(digits[0])
    np.testing.assert_array_equal(pixels[..., 0], np.rint(255 * digits[0]))


def test_digit_without_rng_has_half_pixel_centres():
    assert np.allclose(_centroid(_grey(DigitTransform()(_blob()))), 0, atol=1e-4)
    centroid_px = _centroid(_grey(DigitTransform(image_size=16)(_blob(row=4.5, column=2.5))))
    assert np.allclose(centroid_px, [2, -2], atol=0.1)


def test_digit_is_a_function_of_the_rng(digits):
    pixels = [DigitTransform()(digits[0], np.random.default_rng(seed)) for seed in range(20)]
    assert len({p.tobytes() for p in pixels}) == 20
    assert np.array_equal(pixels[4], DigitTransform()(digits[0], np.random.default_rng(4)))


def test_digit_with_zero_amplitudes_ignores_the_rng(digits):
    still = DigitTransform(degrees=0, shift_px=0, scale=0, shear=0)
    assert np.array_equal(still(digits[1], np.random.default_rng(0)), still(digits[1]))


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
        assert not np.allclose(transform(_blob(), np.random.default_rng(0)), plain, atol=6)


def test_digit_refuses_a_colour_image():
    with pytest.raises(InputError, match="square grey image") as error:
        DigitTransform()(np.zeros((8, 8, 3), np.float32))
    assert error.value.field == "image" and error.value.given == (8, 8, 3)


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
    np.testing.assert_array_equal(pixels, _plain_adm_crop(image, 24), strict=True)


def test_photo_crop_of_a_file_equals_the_reference_step_by_step():
    data = encode(Image.fromarray(noise(640, 427)), "JPEG", quality=90)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture = picture.resize((320, 213), Image.Resampling.BOX)  # 427 and 213 are at least 2 x 64, 106 is not
    picture = picture.resize((160, 106), Image.Resampling.BOX)
    picture = picture.resize((97, 64), Image.Resampling.BICUBIC)  # 160 x 64 / 106 = 96.6
    expected_YX3 = np.asarray(picture)[:, 16 : 16 + 64]  # (97 - 64) // 2
    np.testing.assert_array_equal(PhotoTransform(64, flip=True)(data), expected_YX3, strict=True)


def test_random_crop_cuts_anywhere_from_every_allowed_size():
    side, ramp = 16, np.arange(64) * 4
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 0), axis=-1).astype(np.uint8)
    transform = PhotoTransform(side, flip=False, crop="random", min_crop=0.5)
    assert np.array_equal(transform(image), PhotoTransform(side, flip=False)(image))
    spans, tops = [], []
    for seed in range(80):
        pixels = transform(image, np.random.default_rng(seed)).astype(float)
        spans.append((pixels[-1, 0, 0] - pixels[0, 0, 0]) / (ramp[-1] - ramp[0]))  # share of the shorter side
        tops.append(pixels[0, 0, 0] / 255)
    assert 0.45 < min(spans) < 0.55 and 0.9 < max(spans) <= 1
    assert min(tops) < 0.03 and max(tops) > 0.4


def test_resized_crop_keeps_the_allowed_share_of_the_area_and_shape():
    ramp = np.arange(64) * 4
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 0), axis=-1).astype(np.uint8)
    transform = PhotoTransform(32, flip=False, crop="resized", min_crop=0.25)
    sizes = []
    for seed in range(80):
        pixels = transform(image, np.random.default_rng(seed)).astype(float)
        slopes = pixels[20, 16, 0] - pixels[12, 16, 0], pixels[16, 20, 1] - pixels[16, 12, 1]
        sizes.append(np.array(slopes) / 8 * 32 / 256)  # height and width as shares of the picture
    areas, aspects = np.prod(sizes, axis=1), np.divide(*np.transpose(sizes))
    assert 0.2 < areas.min() < 0.32 and 0.8 < areas.max() < 1.05
    assert 0.7 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.42


def test_views_of_a_cache_are_the_picture_its_mirror_image_and_then_crops():
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    plain = PhotoTransform(16, flip=False)(image)
    rng = lambda: np.random.default_rng(1)
    still = PhotoTransform(16, flip=True)
    assert np.array_equal(still.view(image, 0, rng()), plain)
    assert np.array_equal(still.view(image, 1, rng()), plain[:, ::-1])
    moving = PhotoTransform(16, flip=True, crop="random")
    assert np.array_equal(moving.view(image, 1, rng()), plain[:, ::-1])
    assert np.array_equal(moving.view(image, 2, rng()), moving.view(image, 3, rng())[:, ::-1])
    assert not np.array_equal(moving.view(image, 2, rng()), plain)


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"flip": True}, (2,), (0, 1, 3, 4)),
        ({"flip": False}, (1,), (0, 2)),
        ({"flip": True, "crop": "random"}, (2, 4), (0, 1, 3)),
        ({"flip": False, "crop": "resized"}, (1, 5), (0,)),
    ],
)
def test_numbers_of_views_that_repeat_or_leave_out_are_refused(options, good, bad):
    transform = PhotoTransform(16, **options)
    for num_views in good:
        transform.check_views(num_views)
    for num_views in bad:
        with pytest.raises(InputError, match=f"data.num_views must .*, got {num_views}"):
            transform.check_views(num_views)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"crop": "middle"}, "data.crop must be one of centre.*'middle'"), ({"min_crop": 0}, "data.min_crop .* 0")],
)
def test_photo_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PhotoTransform(16, flip=False, **options)


def test_mirror_draw_of_a_photo_is_the_view_that_is_picked_of_both():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    transform = PhotoTransform(16, flip=True)
    views = np.stack([transform.view(image, view, None) for view in range(2)]).reshape(2, -1)
    for index in range(30):
        rng = np.random.Generator(np.random.Philox(key=[5, index]))
        assert np.array_equal(transform(image, rng).ravel(), pick_views(views[None], 5, np.array([index]))[0])


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
    assert pixels.shape == (8, 8, 3) and pixels.min() == 0 and pixels.max() == 255
    with pytest.raises(InputError, match="image must have dtype uint8, got float32"):
        PhotoTransform(8, flip=False)(np.zeros((8, 8, 3), np.float32))
