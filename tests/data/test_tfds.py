"""The real ImageNet builder of TFDS on tiny tars, and other sets; nothing is downloaded."""

import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
from image_files import encode, noise
from PIL import Image

from mvar_jax.data.pipeline import eval_batches, train_batches
from mvar_jax.data.sources import open_source
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError

SYNSETS = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999
NUM_VAL = 30  # the builder names the labels of the first ones by the order of the files


def _add(archive, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _jpeg(seed):
    return encode(Image.fromarray(noise(20, 18, seed=seed)), "JPEG", quality=90)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """(where it was prepared, the training files by name)."""
    import tensorflow_datasets as tfds

    root, files = tmp_path_factory.mktemp("imagenet"), {}
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for k, synset in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(4):
                    files[f"{synset}_{i}.JPEG"] = _jpeg(10 * k + i)
                    _add(archive, f"{synset}_{i}.JPEG", files[f"{synset}_{i}.JPEG"])
            _add(outer, f"{synset}.tar", inner.getvalue())
    one = encode(Image.new("RGB", (2, 2), (200, 0, 0)), "JPEG")
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(1, NUM_VAL + 1):
            _add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", one)
    builder = tfds.builder("imagenet2012", data_dir=root / "prepared", file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    return root / "prepared", files


def test_imagenet_gives_every_file_as_it_is_with_its_label(imagenet):
    path, files = imagenet
    source = open_source("tfds", "train", path=str(path), tfds_name="imagenet2012")
    assert source.num_classes == len(source.label_names) == 1000 and len(source) == 12
    found = {}
    for i in range(12):
        item = source[i]
        found[source.name_of(i).split()[-1]] = item["image"]
        assert item["label"] == {"n01440764": 0, "n01443537": 1, "n15075141": 999}[source.name_of(i).split()[-1][:9]]
    assert found == files
    assert source.label_names[0] == "n01440764"


def test_imagenet_feeds_training_and_validation(imagenet):
    path, _ = imagenet
    transform = PhotoTransform(16, flip=True)
    source = open_source("tfds", "train", path=str(path), tfds_name="imagenet2012")
    batches = train_batches(source, transform, batch_size=12, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (12, 16, 16, 3) and sorted(batch["label"]) == [0] * 4 + [1] * 4 + [999] * 4
    val = open_source("tfds", "val", path=str(path), tfds_name="imagenet2012")
    names = [val.name_of(i).split()[-1] for i in range(NUM_VAL)]
    assert val[names.index("ILSVRC2012_val_00000001.JPEG")]["label"] == 65  # a sea snake
    seen = list(eval_batches(val, transform, batch_size=16))
    assert sum(batch["mask"].sum() for batch in seen) == NUM_VAL
    assert np.allclose(seen[0]["image"][0, 8, 8], (200, 0, 0), atol=6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "data.name must be .*imagenet2012.*--config.data.name"),
        ("imagenet2021", "data.name must be .*got 'imagenet2021'"),
        ("mnist", "prepared as Array"),
    ],
)
def test_set_that_is_not_there_is_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        open_source("tfds", "train", path=str(tmp_path), tfds_name=name)
    assert list(tmp_path.iterdir()) == []


def test_set_without_a_training_split_is_refused_with_the_splits_that_it_has(imagenet, tmp_path):
    shutil.copytree(imagenet[0] / "imagenet2012", tmp_path / "imagenet2012")
    (file,) = tmp_path.rglob("dataset_info.json")
    info = json.loads(file.read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] != "train"]
    file.write_text(json.dumps(info))
    for split in ("train", "val"):
        with pytest.raises(InputError, match="data.name must be a data set with a split train, .*, which has valid"):
            open_source("tfds", split, path=str(tmp_path), tfds_name="imagenet2012")


def test_missing_tfds_is_refused_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'mvar_jax\[tfds\]'"):
        open_source("tfds", "train", tfds_name="imagenet2012")
