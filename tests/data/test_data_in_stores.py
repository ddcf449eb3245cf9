"""Images in an object store: the same source as of the same folder on a disk."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from image_files import write_tree

from mvar_jax.data import tar_index, tars
from mvar_jax.data.decoding import BadImage
from mvar_jax.data.folder import FolderSource
from mvar_jax.data.sources import open_source
from mvar_jax.errors import InputError
from mvar_jax.files.directories import upload_folder
from mvar_jax.files.paths import as_path


def test_folder_in_a_store_equals_the_folder_on_a_disk(store, tmp_path):
    write_tree(tmp_path, classes=("ant", "bee.wild", "cat"))
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/.hidden.jpg").write_text("no image")
    (tmp_path / "train/ant/deeper").mkdir()
    (tmp_path / "train/ant/deeper/9.jpg").write_text("an image of the class")
    (tmp_path / "train/ant/deeper/.hidden.jpg").write_text("no image")
    (tmp_path / "train/_old").mkdir()
    (tmp_path / "train/_old/9.jpg").write_text("no class")
    (tmp_path / "train/readme.md").write_text("no class")
    url = f"{store.url}/images"
    upload_folder(tmp_path, as_path(url))
    for split in ("train", "val"):
        ours, theirs = FolderSource(url, split), FolderSource(tmp_path, split)
        assert ours.label_names == theirs.label_names == ("ant", "bee.wild", "cat")
        assert [ours.name_of(i) for i in range(len(ours))] == [theirs.name_of(i) for i in range(len(theirs))]
        assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
        assert ours.notes == tuple(note.replace(str(tmp_path), url) for note in theirs.notes)
        everything = np.arange(len(ours))
        assert (
            ours.files_digest(everything, with_sizes=True) == theirs.files_digest(everything, with_sizes=True) != ""
        )
        assert ours.identity() == theirs.identity()
    (as_path(url) / "val/ant/0.jpg").unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        ours[0]  # of val


def test_class_that_only_validation_has_is_refused_in_a_store_too(s3, tmp_path):
    write_tree(tmp_path)
    (tmp_path / "val/dog").mkdir()
    (tmp_path / "val/dog/0.jpg").write_text("x")
    url = f"{s3.url}/more_classes"
    upload_folder(tmp_path, as_path(url))
    with pytest.raises(InputError, match=f"{url}/val/dog must be one of the classes of {url}/train"):
        FolderSource(url, "val")


def test_folder_that_is_not_in_the_store_is_refused(s3):
    with pytest.raises(
        InputError, match="data.path must be a folder that holds train/CLASS/, got 's3://bucket/none'"
    ):
        FolderSource(f"{s3.url}/none", "train")


def write_tar(path, split, numbers):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for name, data in (
                (f"{number:03d}.cls", str(number % 3)),
                (f"{number:03d}.jpg", f"{split} {number}" * 99),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data.encode()))


def test_tars_in_a_store_equal_tars_on_a_disk_and_are_scanned_once(store, tmp_path, monkeypatch):
    for split, numbers in (("train-0", range(5)), ("train-1", range(5, 8)), ("val", range(3))):
        write_tar(tmp_path / f"{split}.tar", split, numbers)
    url = f"{store.url}/tars"
    upload_folder(tmp_path, as_path(url))
    items = lambda source: [(source.name_of(i), source[i]) for i in range(len(source))]
    for split in ("train", "val"):
        expected = items(tars.TarSource(tmp_path, split))
        source = tars.TarSource(url, split)
        assert items(source) == expected and items(pickle.loads(pickle.dumps(source))) == expected
    monkeypatch.setattr(tar_index, "_scan", lambda path: pytest.fail(f"{path} is scanned again"))
    assert items(tars.TarSource(url, "val")) == expected


def test_prepared_data_sets_must_lie_on_this_machine(s3):
    pytest.importorskip("tensorflow_datasets", reason="extra tfds")
    with pytest.raises(InputError, match="data.path must be a path of this machine's file systems, since"):
        open_source("tfds", "train", path=f"{s3.url}/tfds", tfds_name="imagenet2012")
