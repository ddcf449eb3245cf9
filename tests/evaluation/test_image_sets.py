import json
import os
import tarfile

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from mvar_jax.errors import InputError
from mvar_jax.evaluation import image_sets
from mvar_jax.evaluation.image_sets import open_images, require_usable

SIDE = 12
CROP = "then ADM's centre crop to 12 x 12 pixels"


@pytest.fixture
def photos(tmp_path):
    """A folder with photos of several sizes, a file that is none, and a text; the pixels of the photos by name."""
    found = {"a/x.png": noise(30, 20, 0), "a/y.png": noise(12, 40, 1), "b/z.png": noise(12, 12, 2)}
    for name, pixels in found.items():
        path = tmp_path / "photos" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "train").symlink_to("val")
    (tmp_path / "photos" / "val" / "b" / "broken.jpg").write_bytes(b"no image")
    with tarfile.open(tmp_path / "photos" / "val.tar", "w") as tar:
        tar.add(tmp_path / "photos" / "val" / "b", "0")
    config = {"data": {"source": "digits", "image_size": SIDE, "size": 7}, "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.savez(tmp_path / "four.npz", arr_0=np.stack([noise(SIDE, SIDE, i) for i in range(4)]))
    return tmp_path


def stream(images, numbers=None) -> list:
    return list(images.stream(range(len(images)) if numbers is None else numbers))


@pytest.mark.parametrize(
    ("source", "num", "num_bad", "transform"),
    [
        ("{}/photos/val", 4, 1, f"turned upright, {CROP}"),
        ("{}/photos/val/b/z.png", 1, 0, f"turned upright, {CROP}"),
        ("{}/four.npz", 4, 0, f"turned upright, {CROP}"),
        ("folder:val:{}/photos", 4, 1, f"turned upright, {CROP}"),
        ("config:val", 7, 0, "enlarged to 12 x 12 pixels by cubic splines"),
        ("digits:val", 360, 0, "enlarged to 12 x 12 pixels by cubic splines"),
    ],
)
def test_every_form_of_source_gives_squares_of_one_size(photos, source, num, num_bad, transform):
    images = open_images(source.format(photos), SIDE, photos / "out", tokenizer=photos)
    found = stream(images)
    assert (len(images), len(found), sum(isinstance(x, str) for x in found)) == (num, num, num_bad)
    assert {(x.shape, x.dtype.name) for x in found if not isinstance(x, str)} == {((SIDE, SIDE, 3), "uint8")}
    assert images.about["transform"] == transform
    json.dumps(images.about)


def test_images_that_have_the_size_stay_as_they_are_and_any_numbers_can_be_read(photos):
    images = open_images(f"{photos}/four.npz", SIDE, photos / "out")
    for number, pixels in zip((1, 3), stream(images, [1, 3]), strict=True):
        np.testing.assert_array_equal(pixels, noise(SIDE, SIDE, number))
    images = open_images(f"{photos}/photos/val", SIDE, photos / "out")
    assert images.name_of(3) == "b/z.png"
    np.testing.assert_array_equal(stream(images, [3])[0], noise(12, 12, 2))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_npz_of_any_channels_gives_images_of_those_that_are_asked_for(tmp_path, channels):
    for stored in (1, 3, 4):
        np.savez(tmp_path / "x.npz", arr_0=np.full((2, SIDE, SIDE, stored), 255, np.uint8))
        images = open_images(f"{tmp_path}/x.npz", SIDE, tmp_path / "out", channels=channels)
        assert [image.shape for image in stream(images)] == [(SIDE, SIDE, channels)] * 2


def test_the_orientation_tag_is_obeyed_unless_told_otherwise(tmp_path):
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(noise(SIDE, SIDE)).save(tmp_path / "x.png", exif=exif)
    upright, stored = (stream(open_images(str(tmp_path), SIDE, tmp_path / "out", x))[0] for x in (True, False))
    np.testing.assert_array_equal(stored, noise(SIDE, SIDE))
    np.testing.assert_array_equal(upright, stored[::-1, ::-1])


def open_about(photos, source: str) -> dict:
    return open_images(source.format(photos), SIDE, photos / "out", tokenizer=photos).about


def test_other_images_of_a_source_are_told_apart(photos):
    """What stands in `about` decides whether a folder of results may be continued."""
    sources = "{}/photos/val", "{}/four.npz"
    before = [open_about(photos, source) for source in sources]
    assert [open_about(photos, source) for source in sources] == before
    Image.fromarray(noise(SIDE, SIDE)).save(photos / "photos" / "val" / "new.png")
    np.savez(photos / "four.npz", arr_0=np.stack([noise(SIDE, SIDE, i) for i in range(1, 5)]))
    for source, old in zip(sources, before, strict=True):
        assert open_about(photos, source)["identity"] != old["identity"]
    assert open_about(photos, "digits:val")["identity"] != open_about(photos, "digits:train")["identity"]


@pytest.mark.parametrize("source", ["{}/photos/val", "{}/photos/val/b/z.bmp", "folder:val:{}/photos"])
def test_other_contents_under_the_same_names_are_told_apart(photos, source):
    """Uncompressed images of one size have the same number of bytes too, so that only their contents differ."""
    path, find_identity = photos / "photos" / "val" / "b" / "z.bmp", lambda: open_about(photos, source)["identity"]
    Image.fromarray(noise(12, 12, 2)).save(path)
    before = find_identity()
    os.utime(path, (0, 0))  # a copy of the same images has other times
    assert find_identity() == before
    Image.fromarray(noise(12, 12, 3)).save(path)
    assert find_identity() != before


@pytest.mark.parametrize("source", ["{}/photos/val", "folder:val:{}/photos"])
def test_other_sizes_are_noticed_of_images_whose_contents_are_not_read(photos, source, monkeypatch):
    monkeypatch.setattr(image_sets, "NUM_CONTENTS", 1)  # of the first one, a/x.png
    before = open_about(photos, source)["identity"]
    Image.fromarray(noise(40, 40, 5)).save(photos / "photos" / "val" / "b" / "z.png")
    assert open_about(photos, source)["identity"] != before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "--images must be an image file or a folder of .jpg"),
        ("nowhere.npz", "images=nowhere.npz is not a usable .npz file: No such file"),
        ("digits:test", "--images must be digits:SPLIT with SPLIT train or val, got 'digits:test'"),
        ("tars:val", "--images must be tars:SPLIT:WHERE with SPLIT train or val, got 'tars:val'"),
        ("digits:val:here", "--images must be digits:SPLIT with"),
        ("config:val", "--images=config:val needs the config.json of a training workdir as --tokenizer"),
    ],
)
def test_a_source_that_is_none_is_refused_in_one_sentence(tmp_path, source, words):
    with pytest.raises(InputError) as caught:
        open_images(source, SIDE, tmp_path / "out", tokenizer=tmp_path)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_set_without_a_usable_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    images = open_images(str(tmp_path), SIDE, tmp_path / "out")
    with pytest.raises(InputError, match="--images must hold an image that can be used, got 1 bad ones"):
        require_usable(images)
    Image.fromarray(noise(SIDE, SIDE)).save(tmp_path / "b.png")
    require_usable(open_images(str(tmp_path), SIDE, tmp_path / "out"))
