"""Sources of files: folder trees and tars."""

import io
import os
import pickle
import tarfile

import pytest
from image_files import write_tree

from mvar_jax.data import tars
from mvar_jax.data.decoding import BadImage
from mvar_jax.data.names import Names
from mvar_jax.data.sources import open_source
from mvar_jax.errors import InputError


def _write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


@pytest.fixture
def tar_folder(tmp_path):
    """Two train tars and one val tar; the bytes of an image are its key."""
    for split, numbers in (("train-0", range(5)), ("train-1", range(5, 8)), ("val", range(3))):
        members = []
        for i in numbers:
            members += [(f"d/{i:03d}.cls", str(i % 4).encode()), (f"d/{i:03d}.jpg", f"{split} {i}".encode())]
        _write_tar(tmp_path / f"{split}.tar", [*members, ("d/readme.txt", b"no sample")])
    return tmp_path


def _items(source):
    return [(source.name_of(i), source[i]["image"], source[i]["label"]) for i in range(len(source))]


def test_names_come_back_as_they_went_in():
    names = ["", "a.jpg", "ü.png", os.fsdecode(b"\xff.jpg")]
    stored = pickle.loads(pickle.dumps(Names(names)))
    assert [stored[i] for i in range(4)] == names and len(stored) == 4
    with pytest.raises(IndexError):
        stored[4]


def test_folder_gives_every_file_once_with_the_label_of_its_class_by_name(tree):
    (tree / "train/ant/notes.txt").write_text("no image")
    (tree / "train/ant/.hidden.jpg").write_text("no image")
    (tree / "train/.cache").mkdir()
    os.rename(tree / "train/bee/0.jpg", tree / "train/bee/0.JPEG")
    source = open_source("folder", "train", path=str(tree))
    assert source.label_names == ("ant", "bee", "cat") and source.num_classes == 3
    items = _items(source)
    wanted = {str(path.relative_to(tree / "train")) for path in tree.glob("train/*/[0-9]*")}
    assert {name for name, _, _ in items} == wanted and len(items) == 15
    for name, data, label in items:
        assert data == (tree / "train" / name).read_bytes()
        assert source.label_names[label] == name.split("/")[0]


def test_folders_called_by_numbers_are_sorted_by_number(tmp_path):
    numbers = tuple(str(i) for i in range(12))
    tree = write_tree(tmp_path / "numbers", numbers, num_train=1, num_val=1)
    for split in ("train", "val"):
        source = open_source("folder", split, path=str(tree))
        assert source.label_names == numbers
        assert [(name, label) for name, _, label in _items(source)] == [(f"{i}/0.jpg", i) for i in range(12)]
    mixed = write_tree(tmp_path / "mixed", ("0", "1", "10", "2", "other"), num_train=1, num_val=1)
    assert open_source("folder", "train", path=str(mixed)).label_names == ("0", "1", "10", "2", "other")


def test_folder_keeps_an_order_of_classes_that_it_is_given(tree):
    order = ("cat", "ant", "bee")
    source = open_source("folder", "val", path=str(tree), class_order=order)
    assert source.label_names == order
    assert [(name, label) for name, _, label in _items(source)][::2] == [
        ("cat/0.jpg", 0),
        ("ant/0.jpg", 1),
        ("bee/0.jpg", 2),
    ]
    for others, different in ((("cat", "ant"), "bee"), (("cat", "ant", "bee", "cat"), "one listed twice")):
        with pytest.raises(InputError, match=f"^data.class_order must list the 3 classes .*different: {different}"):
            open_source("folder", "val", path=str(tree), class_order=others)


def test_folder_of_validation_has_the_labels_of_train_even_where_a_class_is_missing(tree):
    for path in (tree / "val/bee").iterdir():
        path.unlink()
    (tree / "val/bee").rmdir()
    source = open_source("folder", "val", path=str(tree))
    assert [label for _, _, label in _items(source)] == [0, 0, 2, 2] and source.num_classes == 3


def test_folder_file_that_vanished_is_a_bad_image(tree):
    source = open_source("folder", "val", path=str(tree))
    (tree / "val/ant/1.jpg").unlink()
    assert source[0]["label"] == 0
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source[1]


def test_size_keeps_images_of_every_class(tree):
    source = open_source("folder", "train", path=str(tree), size=6)
    assert [label for _, _, label in _items(source)] == [0, 0, 1, 1, 2, 2]
    assert source.label_names == ("ant", "bee", "cat")
    with pytest.raises(InputError, match="data.size must be at most 15.*got 16"):
        open_source("folder", "train", path=str(tree), size=16)


def test_folder_that_is_none_is_refused_with_its_path(tree, tmp_path):
    for path, message in ((tmp_path / "none", "train/CLASS/.*none"), ("", "--config.data.path")):
        with pytest.raises(InputError, match=f"data.path .*{message}"):
            open_source("folder", "train", path=str(path))
    (tree / "val/dog").mkdir()
    with pytest.raises(InputError, match="val/dog.*one of the classes"):
        open_source("folder", "val", path=str(tree))
    for path in tree.glob("train/*/*"):
        path.unlink()
    with pytest.raises(InputError, match="train must hold.*.webp files"):
        open_source("folder", "train", path=str(tree))
    (tmp_path / "flat/train").mkdir(parents=True)
    with pytest.raises(InputError, match="no class folders"):
        open_source("folder", "train", path=str(tmp_path / "flat"))


def test_tars_give_every_sample_with_the_label_beside_it(tar_folder):
    source = open_source("tars", "train", path=str(tar_folder))
    assert source.label_names == ("0", "1", "2", "3")
    shards = [("train-0", i) for i in range(5)] + [("train-1", i) for i in range(5, 8)]
    wanted = [(f"{name}.tar:d/{i:03d}.jpg", f"{name} {i}".encode(), i % 4) for name, i in shards]
    assert _items(source) == wanted
    assert _items(pickle.loads(pickle.dumps(source))) == wanted
    val = open_source("tars", "val", path=str(tar_folder))
    assert len(val) == 3 and val.num_classes == 4


def test_tar_index_is_read_once_and_made_anew_for_a_changed_tar(tar_folder, monkeypatch):
    scans = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda path: scans.append(path.name) or scan(path))
    first = _items(open_source("tars", "val", path=str(tar_folder)))
    assert scans == ["val.tar", "train-0.tar", "train-1.tar"]
    assert _items(open_source("tars", "val", path=str(tar_folder))) == first and len(scans) == 3
    _write_tar(tar_folder / "val.tar", [("k.png", b"new"), ("k.cls", b"1\n")])
    assert _items(open_source("tars", "val", path=str(tar_folder))) == [("val.tar:k.png", b"new", 1)]
    assert scans[3:] == ["val.tar"]
    (tar_folder / "val.tar.index.npz").write_bytes(b"damaged")
    assert len(open_source("tars", "val", path=str(tar_folder))) == 1 and scans[4:] == ["val.tar"]


def test_tars_take_class_names_from_their_file(tar_folder):
    (tar_folder / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    assert open_source("tars", "val", path=str(tar_folder)).label_names == ("ant", "bee", "cat", "dog", "eel")
    (tar_folder / "classes.txt").write_text("ant\nbee")
    with pytest.raises(InputError, match="label must be from 0 to 1.*got 2"):
        open_source("tars", "val", path=str(tar_folder))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], "train.tar:a.jpg has no label; add a .cls file"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "train.tar.*labels in .cls files"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label must be .*got -1"),
        ([], "files in its train tars"),
        (None, "train.tar.*readable tar"),
    ],
)
def test_tar_that_cannot_be_used_is_refused(tmp_path, members, message):
    if members is None:
        (tmp_path / "train.tar").write_bytes(bytes(range(256)) * 8)
    else:
        _write_tar(tmp_path / "train.tar", members)
    with pytest.raises(InputError, match=message):
        open_source("tars", "train", path=str(tmp_path))
    with pytest.raises(InputError, match="data.path must be .*val"):
        open_source("tars", "val", path=str(tmp_path))
