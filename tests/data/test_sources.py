import hashlib

import numpy as np
import pytest

from mvar_jax.data import photos
from mvar_jax.data.photos import CropSource
from mvar_jax.data.sources import open_source
from mvar_jax.errors import InputError


def _rows(source):
    images = np.stack([source[i]["image"] for i in range(len(source))])
    return {image.tobytes() for image in images}, np.array([source[i]["label"] for i in range(len(source))])


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "train"), open_source("digits", "val")


def test_digits_splits_are_disjoint_and_cover_all_images(digits):
    train, val = digits
    assert (len(train), len(val)) == (1437, 360)
    train_images, val_images = _rows(train)[0], _rows(val)[0]
    assert not train_images & val_images
    assert len(train_images) + len(val_images) == 1797


def test_digits_splits_hold_every_class_in_proportion(digits):
    counts = [np.bincount(_rows(source)[1], minlength=10) for source in digits]
    assert np.all(np.abs(counts[1] - (counts[0] + counts[1]) * 0.2) <= 1)


def test_digits_split_is_the_recorded_one_for_seed_0(digits):
    digest = hashlib.sha256(b"".join(digits[1][i]["image"].tobytes() for i in range(360)))
    assert digest.hexdigest()[:16] == "7ccd56919e300165"


def test_digits_split_changes_with_the_seed_only(digits):
    again = _rows(open_source("digits", "val"))[0]
    other = _rows(open_source("digits", "val", split_seed=1))[0]
    assert again == _rows(digits[1])[0]
    assert other != again


def test_digits_images_are_float32_in_unit_range_with_labels_of_the_named_classes(digits):
    item = digits[0][3]
    assert item["image"].shape == (8, 8) and item["image"].dtype == np.float32
    images = np.stack([digits[0][i]["image"] for i in range(len(digits[0]))])
    assert images.min() == 0 and images.max() == 1
    assert digits[0].label_names == tuple("0123456789") and digits[0].num_classes == 10


def test_size_keeps_that_many_images(digits):
    assert len(open_source("digits", "val", size=7)) == 7
    with pytest.raises(InputError, match="data.size must be at most 360.*got 361"):
        open_source("digits", "val", size=361)


def test_synthetic_images_repeat_exactly_and_differ_between_indices_and_splits():
    first, again = (open_source("synthetic", "train", size=12) for _ in range(2))
    val = open_source("synthetic", "val", size=12)
    assert len(first) == 12
    assert first[3]["image"].shape == (64, 64, 3) and first[3]["image"].dtype == np.uint8
    assert np.array_equal(first[3]["image"], again[3]["image"])
    assert not np.array_equal(first[1]["image"], first[11]["image"])
    assert not np.array_equal(first[3]["image"], val[3]["image"])
    with pytest.raises(IndexError):
        first[12]


def test_synthetic_label_can_be_told_from_the_mean_colour():
    train = open_source("synthetic", "train", size=20)
    val = open_source("synthetic", "val", size=20)
    means = np.stack([train[i]["image"].mean((0, 1)) for i in range(10)])
    for i in range(20):
        nearest = np.argmin(np.square(val[i]["image"].mean((0, 1)) - means).sum(1))
        assert nearest == val[i]["label"] == i % 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digit", "split": "train"}, "data.source must be one of digits.*'digit'"),
        ({"name": "digits", "split": "test"}, "split must be one of train, val, got 'test'"),
        (
            {"name": "digits", "split": "val", "val_fraction": 1.0},
            "data.val_fraction must be above 0 and below 1, got 1.0",
        ),
        (
            {"name": "digits", "split": "val", "val_fraction": 0.9999},
            "data.val_fraction must be such that each split of the 1797 digits has 10 or more, got 0.9999",
        ),
        ({"name": "digits", "split": "val", "split_seed": -1}, "data.split_seed must be from 0.*got -1"),
        ({"name": "synthetic", "split": "train"}, "data.size must be 1 or more.*got 0"),
    ],
)
def test_open_source_names_the_field_it_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        open_source(**arguments)


NUMBERED = {
    name: np.stack([np.full((9, 20), first), *np.indices((9, 20))], axis=-1).astype(np.uint8)
    for first, name in enumerate(("a.png", "b.png"))
}  # each pixel is its photograph, row and column


def test_crops_of_the_splits_share_no_pixel_and_cover_their_parts():
    seen = {}
    for split in ("train", "val"):
        source = CropSource(NUMBERED, split, side=4, val_fraction=0.2)
        crops = [source[i]["image"] for i in range(len(source))]
        assert {crop.shape for crop in crops} == {(4, 4, 3)}
        assert len({crop.tobytes() for crop in crops}) == len(source)
        assert all(source[i]["label"] == crops[i][0, 0, 0] for i in range(len(source)))
        seen[split] = {tuple(pixel) for crop in crops for pixel in crop.reshape(-1, 3)}
    train = {(photo, y, x) for photo in range(2) for y in range(9) for x in range(16)}
    val = {(photo, y, x) for photo in range(2) for y in range(8) for x in range(16, 20)}
    assert seen == {"train": train, "val": val}


def test_training_crops_are_at_every_position_and_named_by_it():
    source = CropSource(NUMBERED, "train", side=4, val_fraction=0.2)
    assert len(source) == 2 * 6 * 13
    assert source.name_of(6 * 13 + 14) == "b.png at 1, 1" and source[6 * 13 + 14]["image"][0, 0].tolist() == [1, 1, 1]


def test_photographs_are_part_of_the_identity():
    one, both = (CropSource(dict(list(NUMBERED.items())[:n]), "val", 4, 0.2).identity() for n in (1, 2))
    assert one["files"] != both["files"]


def test_photographs_that_scikit_learn_brings_are_found():
    source = open_source("photos", "val", image_size=64)
    assert {"china", "flower"} <= set(source.label_names)
    images = np.stack([source[i]["image"] for i in range(24)])
    assert images.shape == (24, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 30


def test_no_photograph_names_the_command_that_brings_some(monkeypatch):
    monkeypatch.setattr(photos, "FILES", {"no_such_package": ("data", ("a.png",))})
    with pytest.raises(InputError, match="no photograph in the installed packages; .*pip install scikit-learn"):
        open_source("photos", "train")


@pytest.mark.parametrize(("side", "fraction", "most"), [(5, 0.2, 4), (10, 0.5, 9), (5, 0.8, 4)])
def test_crop_that_exceeds_a_part_is_refused_with_the_largest(side, fraction, most):
    with pytest.raises(InputError, match=rf"data.image_size must be at most {most}, .*a.png \(20 x 9.*got {side}"):
        CropSource(NUMBERED, "train", side, fraction)
