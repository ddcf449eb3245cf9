"""Members of a tar that are links, appended again, or several of one key: none may be lost or swapped silently."""

import tarfile

import numpy as np
import pytest
from image_files import write_tar

from mvar_jax.data import tar_index
from mvar_jax.data.sources import open_source
from mvar_jax.errors import InputError
from mvar_jax.files.npz import load_npz, save_npz


def _open(folder, members):
    write_tar(folder / "train.tar", members)
    return open_source("tars", "train", path=str(folder), val_fraction=0)


def _items(source):
    return {source.name_of(i).split(":")[1]: (source[i]["image"], source[i]["label"]) for i in range(len(source))}


def test_hard_links_give_the_image_and_the_label_that_they_lead_to(tmp_path):
    members = [("0.jpg", b"zero"), ("0.cls", b"1"), ("1.jpg", b"one"), ("1.cls", b"0")]
    members += [("2.jpg", "0.jpg"), ("2.cls", "1.cls"), ("3.jpg", "2.jpg"), ("3.cls", "0.cls")]
    assert _items(_open(tmp_path, members)) == {
        "0.jpg": (b"zero", 1),
        "1.jpg": (b"one", 0),
        "2.jpg": (b"zero", 0),
        "3.jpg": (b"zero", 1),
    }


def test_a_hard_link_without_its_target_is_refused(tmp_path):
    with pytest.raises(InputError, match="train.tar must be a readable tar .1.jpg is a hard link to 0.jpg, which"):
        _open(tmp_path, [("1.jpg", "0.jpg"), ("1.cls", b"0")])


def test_members_that_are_no_files_are_counted_in_the_note(tmp_path):
    write_tar(tmp_path / "train.tar", [("0.jpg", b"0"), ("0.cls", b"0")])
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.SYMTYPE), ("p", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.jpg"
            archive.addfile(entry)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    source = open_source("tars", "train", path=str(tmp_path), val_fraction=0)
    words = "3 files of other kinds are ignored: 2 symbolic links, 1 special files (first: train.tar:1.jpg)"
    assert len(source.notes) == 1 and source.notes[0].endswith(words)


@pytest.mark.parametrize("order", [(".jpg", ".png"), (".png", ".jpg")])
def test_of_two_images_of_a_key_the_photograph_is_taken_and_the_other_noted(tmp_path, order):
    data = {".jpg": b"photo", ".png": b"mask"}
    source = _open(tmp_path, [("0.cls", b"0"), *((f"0{suffix}", data[suffix]) for suffix in order)])
    assert _items(source) == {"0.jpg": (b"photo", 0)}
    assert "1 .png beside another image of the key (first: train.tar:0.png)" in source.notes[0]


def test_a_member_that_is_appended_again_replaces_image_and_label(tmp_path):
    source = _open(tmp_path, [("0.jpg", b"old"), ("0.cls", b"0"), ("0.jpg", b"new"), ("0.cls", b"1")])
    assert _items(source) == {"0.jpg": (b"new", 1)} and source.notes[0].endswith("1 classes have no images: 0")


def test_an_index_that_dropped_members_is_made_anew(tmp_path):
    _open(tmp_path, [("0.jpg", b"0"), ("0.cls", b"0"), ("1.jpg", "0.jpg"), ("1.cls", b"0")])
    file = tmp_path / f"train.tar{tar_index.INDEX_SUFFIX}"
    index = dict(load_npz(file))
    stamp = index.pop("stamp")
    index |= {key: index[key][:1] for key in ("offset", "size", "text", "name")}
    save_npz(file, stamp=np.array([2, *stamp[1:]]), **index)
    assert len(open_source("tars", "train", path=str(tmp_path), val_fraction=0)) == 2


@pytest.mark.parametrize("text", ["\ufeffcat\r\ndog\r\n", "cat \n\tdog\n\n \n", "cat\ndog"])
def test_names_of_classes_are_read_without_marks_and_spaces(tmp_path, text):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    source = _open(tmp_path, [("0.jpg", b"0"), ("0.cls", b"dog"), ("1.jpg", b"1"), ("1.cls", b"cat")])
    assert source.label_names == ("cat", "dog") and _items(source) == {"0.jpg": (b"0", 1), "1.jpg": (b"1", 0)}


def test_names_of_classes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfec")
    with pytest.raises(InputError, match="classes.txt must be a readable text in UTF-8"):
        _open(tmp_path, [("0.jpg", b"0"), ("0.cls", b"0")])
