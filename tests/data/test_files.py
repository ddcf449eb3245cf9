"""Sources of files: folder trees and tars."""

import io
import os
import pickle
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from image_files import write_tree
from scipy.io import savemat

from mvar_jax.data import tar_index
from mvar_jax.data.decoding import BadImage
from mvar_jax.data.names import Names
from mvar_jax.data.options import DataOptions
from mvar_jax.data.sources import open_source
from mvar_jax.errors import InputError
from mvar_jax.files.npz import save_npz


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
    (tree / "val.txt").write_text("not asked, since there are class folders")
    with pytest.raises(InputError, match="val/dog.*one of the classes"):
        open_source("folder", "val", path=str(tree))
    for path in tree.glob("train/*/*"):
        path.unlink()
    with pytest.raises(InputError, match="train must hold .jpg, .*.tiff files"):
        open_source("folder", "train", path=str(tree))
    (tmp_path / "flat/train").mkdir(parents=True)
    (tmp_path / "other/Valid/ant").mkdir(parents=True)
    with pytest.raises(InputError, match="got .*other' with Valid: rename to train and val"):
        open_source("folder", "train", path=str(tmp_path / "other"))
    with pytest.raises(InputError, match="no class folders and no images"):
        open_source("folder", "train", path=str(tmp_path / "flat"))


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_validation_folder_of_another_name_is_refused_not_replaced_by_training_images(tree, name):
    os.rename(tree / "val", tree / name)
    for split in ("train", "val"):
        with pytest.raises(InputError, match=f"got .*tree' with .*{name}.*: rename to train and val") as caught:
            open_source("folder", split, path=str(tree))
        assert caught.value.field == "data.path"


@pytest.mark.parametrize("is_link", [False, True])
def test_class_folder_with_the_name_of_an_image_keeps_its_images(tree, is_link):
    before = [data for _, data, _ in _items(open_source("folder", "train", path=str(tree)))]
    os.rename(tree / "train/cat", tree / "cat")
    if is_link:
        (tree / "train/cat.jpg").symlink_to(tree / "cat", target_is_directory=True)
    else:
        os.rename(tree / "cat", tree / "train/cat.jpg")
    os.rename(tree / "val/cat", tree / "val/cat.jpg")
    source = open_source("folder", "train", path=str(tree))
    assert source.label_names == ("ant", "bee", "cat.jpg") and not source.notes
    assert [data for _, data, _ in _items(source)] == before


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
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda path: scans.append(path.name) or scan(path))
    first = _items(open_source("tars", "val", path=str(tar_folder)))
    assert scans == ["val.tar", "train-0.tar", "train-1.tar"]
    assert _items(open_source("tars", "val", path=str(tar_folder))) == first and len(scans) == 3
    _write_tar(tar_folder / "val.tar", [("k.png", b"new"), ("k.cls", b"1\n")])
    assert _items(open_source("tars", "val", path=str(tar_folder))) == [("val.tar:k.png", b"new", 1)]
    assert scans[3:] == ["val.tar"]
    (tar_folder / "val.tar.index.npz").write_bytes(b"damaged")
    assert len(open_source("tars", "val", path=str(tar_folder))) == 1 and scans[4:] == ["val.tar"]


def test_validation_tars_in_a_folder_of_another_name_are_refused_not_replaced_by_training_images(tar_folder):
    (tar_folder / "valid").mkdir()
    os.rename(tar_folder / "val.tar", tar_folder / "valid" / "0.tar")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="data.path must be .* with valid: rename to val"):
            open_source("tars", split, path=str(tar_folder))


def test_tars_take_class_names_from_their_file(tar_folder):
    (tar_folder / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    assert open_source("tars", "val", path=str(tar_folder)).label_names == ("ant", "bee", "cat", "dog", "eel")
    (tar_folder / "classes.txt").write_text("ant\nbee")
    with pytest.raises(InputError, match="label must be from 0 to 1.*got 2"):
        open_source("tars", "val", path=str(tar_folder))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], "train.tar:a.jpg has no label; add a .cls, .txt or .json file"),
        ([("a.jpg", b"x"), ("b.cls", b"1")], "train.tar:a.jpg has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "label must be .*got -1"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 18)], "label must be below 1000000, got 999999999999999999"),
        ([("a.jpg", b"x"), ("a.cls", b"2"), ("b.jpg", b"x"), ("b.cls", b"cat")], "label must be all .*got 2 and cat"),
        ([("a.jpg", b"x"), ("a.txt", b"a caption\nof two lines")], "train.tar:a.jpg has no label"),
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
    with pytest.raises(InputError, match=message):  # of which a part would be held out
        open_source("tars", "val", path=str(tmp_path))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            lambda data, second: data[: second + 100],
            "train.tar must be a readable tar .*cut or damaged at byte .*header",
        ),
        (lambda data, second: data[:second], "train.tar .*ends without an end mark, so it was cut at byte"),
        (lambda data, second: data[: second + 600], "train.tar must be a readable tar .*unexpected end of data"),
        (lambda data, second: data[: second + 9] + b"?" + data[second + 10 :], "cut or damaged at byte"),
        (lambda data, second: data + data, "train.tar .*more follows its end mark at byte .*not cat"),
    ],
)
def test_tar_that_is_not_whole_is_refused_wherever_it_was_cut(tmp_path, cut, message):
    """Nothing may be lost without a word: tarfile ends at a damaged header as at the end mark."""
    members = [(f"{i}.{suffix}", b"1" * (1 + 700 * (suffix == "jpg"))) for i in range(4) for suffix in ("jpg", "cls")]
    _write_tar(tmp_path / "train.tar", members)
    data = (tmp_path / "train.tar").read_bytes()
    second = data.index(b"2.jpg")  # the header of the third image
    (tmp_path / "train.tar").write_bytes(cut(data, second))
    for _ in range(2):  # nor is it taken from an index
        with pytest.raises(InputError, match=message):
            open_source("tars", "train", path=str(tmp_path))


def test_index_of_an_older_version_is_made_anew(tar_folder):
    status = (tar_folder / "val.tar").stat()
    stamp = np.array([status.st_size, status.st_mtime_ns])
    wrong = {"offset": np.array([0]), "size": np.array([9]), "label": np.array([0]), "name": np.array(["wrong"])}
    save_npz(tar_folder / "val.tar.index.npz", stamp=stamp, **wrong)
    assert len(open_source("tars", "val", path=str(tar_folder))) == 3


def test_labels_of_a_tar_come_from_cls_json_or_txt_as_numbers_or_names(tmp_path):
    train = [("a.jpg", b"1"), ("a.txt", b" dog\n"), ("b.png", b"2"), ("b.json", b'{"cls": "cat", "width": 3}')]
    train += [("c.bmp", b"3"), ("c.cls", b"emu"), ("c.json", b'{"label": "dog"}'), ("c.txt", b"a caption\nof two")]
    _write_tar(tmp_path / "train-0.tar", [*train, ("c.seg.png", b"x"), ("d/notes.md", b"x"), ("d/e.md", b"x")])
    _write_tar(
        tmp_path / "val.tar", [("v.tiff", b"4"), ("v.json", b'{"label": 1}'), ("w.gif", b"5"), ("w.cls", b"0 ")]
    )
    source = open_source("tars", "train", path=str(tmp_path))
    assert source.label_names == ("cat", "dog", "emu")
    assert [label for _, _, label in _items(source)] == [1, 0, 2]
    ignored = "3 files of other kinds are ignored: 2 .md, 1 .seg.png \\(first: train-0.tar:c.seg.png"
    assert len(source.notes) == 1 and re.search(ignored, source.notes[0])
    val = open_source("tars", "val", path=str(tmp_path))
    assert [(data, label) for _, data, label in _items(val)] == [(b"4", 1), (b"5", 0)] and not val.notes
    (tmp_path / "classes.txt").write_text("emu\ndog\ncat\nyak\n")
    source = open_source("tars", "train", path=str(tmp_path))
    assert [label for _, _, label in _items(source)] == [1, 2, 0]
    assert source.notes[1].endswith("1 classes have no images: yak")


def test_folders_in_a_class_folder_are_read_and_what_is_not_is_counted_and_named(tree):
    (tree / "train/ant/far/off").mkdir(parents=True)
    os.rename(tree / "train/ant/3.jpg", tree / "train/ant/far/off/3.jpg")
    (tree / "train/ant/far/round").symlink_to(tree / "train/ant", target_is_directory=True)
    (tree / "train/bee/linked").symlink_to(tree / "val/bee", target_is_directory=True)
    os.rename(tree / "train/bee/2.jpg", tree / "train/bee/2.TIF")
    source = open_source("folder", "train", path=str(tree))
    assert not source.notes
    names = [name for name, _, _ in _items(source)]
    assert names[:5] == [f"ant/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "4.jpg", "far/off/3.jpg")]
    assert names[5:12] == [
        f"bee/{i}" for i in ("0.jpg", "1.jpg", "2.TIF", "3.jpg", "4.jpg", "linked/0.jpg", "linked/1.jpg")
    ]
    for name in ("ant/notes.txt", "ant/far/a.heic", "bee/b.heic", "loose.png", "_old.zip", "ant/.hidden"):
        (tree / "train" / name).write_text("x")
    for name in ("fox", "_old", "yak/empty"):
        (tree / "train" / name).mkdir(parents=True)
    source = open_source("folder", "train", path=str(tree))
    assert [name for name, _, _ in _items(source)] == names
    assert [note.removeprefix(f"{tree}/train: ") for note in source.notes] == [
        "4 files of other kinds are ignored: 2 .heic, 1 .txt, 1 .zip (first: _old.zip)",
        "1 images outside the class folders are ignored (first: loose.png)",
        "folders that begin with _ are ignored: _old",
        "2 classes have no images: fox, yak",
    ]


def _splits(source="folder", **options):
    return DataOptions(source, 8, **options).open_all()


@pytest.mark.parametrize("kind", ["folder", "root", "flat", "flat root", "tars"])
def test_without_a_validation_split_a_fraction_of_each_class_is_held_out(tmp_path, kind):
    per_class = {"ant": 20, "bee": 10, "cat": 1}
    names = [f"{i}/{name}" for name, num in per_class.items() for i in range(num)]
    if kind == "tars":
        members = [(f"{n}.{s}", n[-3:].encode()) for n in names for s in ("jpg", "cls")]
        _write_tar(tmp_path / "a.tar", members)
    for name in names * (kind != "tars"):
        number, label = name.split("/")
        place = f"{label}{number}.jpg" if "flat" in kind else f"{label}/{number}.jpg"
        file = tmp_path / ("" if "root" in kind else "train") / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(label.encode())
    source = "tars" if kind == "tars" else "folder"
    open_all = lambda **options: {
        split: _items(s) for split, s in _splits(source, path=f"{tmp_path}/", **options).items()
    }
    found = open_all(val_fraction=0.2)
    parts = {split: {name for name, _, _ in items} for split, items in found.items()}
    assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 31
    held_out = Counter(data for _, data, _ in found["val"])
    assert held_out.total() == 6 and ("flat" in kind or held_out == {b"ant": 4, b"bee": 2})
    assert open_all(val_fraction=0.2) == found
    assert open_all(val_fraction=0.2, split_seed=1)["val"] != found["val"]
    assert {name for name, _, _ in open_all(val_fraction=0.4)["val"]} > parts["val"]
    note = f"{tmp_path}/ has no validation split: 6 of 31 images are held out (data.val_fraction=0.2)"
    sources = _splits(source, path=f"{tmp_path}/")
    assert sources["train"].notes == (note,) and not sources["val"].notes
    assert sources["train"].label_names == (("images",) if "flat" in kind else ("ant", "bee", "cat"))
    whole = open_all(val_fraction=0)
    assert whole.keys() == {"train"} and len(whole["train"]) == 31
    with pytest.raises(InputError, match="data.val_fraction must be above 0, got 0: .* no validation split"):
        DataOptions(source, 8, path=str(tmp_path), val_fraction=0).open("val")
    with pytest.raises(InputError, match="data.val_fraction=0.001 must hold out at least one of the 31 images"):
        open_all(val_fraction=0.001)


def test_an_own_validation_split_is_taken_whatever_the_fraction(tree, tar_folder):
    for source, path in (("folder", tree), ("tars", tar_folder)):
        for fraction in (0, 0.5):
            sources = _splits(source, path=str(path), val_fraction=fraction)
            assert [len(sources[split]) for split in ("train", "val")] == ([15, 6] if source == "folder" else [8, 3])


FLAT = {"val_1.JPEG": b"cat", "val_2.JPEG": b"ant", "val_3.JPEG": b"bee"}
META = np.zeros(3, [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
META["ILSVRC2012_ID"], META["WNID"], META["words"] = [1, 2, 3], ["cat", "bee", "ant"], ["a", "b", "c"]


def _write_flat_val(tree, text, name="val.txt", folder="val"):
    shutil.rmtree(tree / "val")
    (tree / folder).mkdir(parents=True)
    for file, data in FLAT.items():
        (tree / folder / file).write_bytes(data)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text(text)


@pytest.mark.parametrize(
    ("text", "name", "folder"),
    [
        ("val_3.JPEG bee\nval_1.JPEG cat\nval_2.JPEG ant\n", "val.txt", "val"),
        ("val_3.JPEG 1\nval_1.JPEG 2\n\nval_2.JPEG 0", "val.txt", "val"),
        ("cat\nant\nbee\n", "val.txt", "val"),
        ("2\n0\n1\n", "labels.txt", "val"),
        (
            "ImageId,PredictionString\nval_3,bee 1 2 3 4\nval_1,cat 1 2 3 4 cat 5 6 7 8\nval_2,ant 0 0 1 1",
            "l.csv",
            "val",
        ),
        ("val_3.JPEG\tbee\t0\t62\nval_1.JPEG\tcat\t0\t9\nval_2.JPEG\tant\t3\t9\n", "val/marks.txt", "val/images"),
        ("1\n3\n2\n", "devkit/ILSVRC2012_validation_ground_truth.txt", "val"),
    ],
)
def test_flat_validation_folder_takes_its_labels_from_a_file(tree, text, name, folder):
    _write_flat_val(tree, text, name, folder)
    if name.startswith("devkit"):
        savemat(tree / "devkit/meta.mat", {"synsets": META})
    source = open_source("folder", "val", path=str(tree), val_labels="" if name == "val.txt" else str(tree / name))
    items = _items(source)
    assert [source.label_names[label].encode() for _, _, label in items] == [data for _, data, _ in items]
    assert [name.split("/")[-1] for name, _, _ in items] == list(FLAT)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            None,
            "val.txt",
            "val must have class folders, or a file with its labels, .*val.txt or data.val_labels=FILE",
        ),
        ("cat\nant\n", "val.txt", "val.txt must hold as many labels .*: it has 2 lines, but there are 3 images"),
        ("val_1.JPEG cat\nval_2.JPEG ant\n", "val.txt", "it has none for val_3.JPEG"),
        ("val_1.JPEG cat\nval_2.JPEG ant\nval_3.JPEG dog\n", "val.txt", "from 0 to 2: 'dog' is neither"),
        (
            "1\n3\n2\n",
            "val.txt",
            "its numbers begin at 1, in an order that is not .* put the devkit's meta.mat beside",
        ),
        ("1\n1\n2\n", "ILSVRC2012_validation_ground_truth.txt", "its numbers begin at 1, .*meta.mat beside it"),
    ],
)
def test_labels_that_do_not_fit_the_validation_images_are_refused(tree, text, name, message):
    _write_flat_val(tree, text or "", name)
    if text is None:
        (tree / name).unlink()
    with pytest.raises(InputError, match=message):
        open_source("folder", "val", path=str(tree), val_labels="" if name == "val.txt" else str(tree / name))


def test_label_file_without_a_validation_folder_or_unreadable_is_refused(tree):
    with pytest.raises(InputError, match="none.txt must hold a label for each .*cannot be read"):
        open_source("folder", "val", path=str(tree), val_labels=str(tree / "none.txt"))
    shutil.rmtree(tree / "val")
    with pytest.raises(InputError, match="data.val_labels=x.txt needs the folder .*val, which does not exist"):
        open_source("folder", "train", path=str(tree), val_labels="x.txt")
    with pytest.raises(InputError, match="data.val_labels has no meaning for data.source=tars"):
        DataOptions("tars", 8, val_labels="x.txt")


def test_identity_of_files_is_theirs_wherever_they_lie_and_tells_every_name(tree, tmp_path):
    identity = lambda path, **options: _splits(path=path, **options)["train"].identity()
    shutil.copytree(tree, tmp_path / "copy")
    assert identity(str(tree)) == identity(f"{tmp_path}/copy/")
    (tmp_path / "copy/train/bee/3.jpg").write_bytes(b"other pixels")
    assert identity(str(tree)) == identity(f"{tmp_path}/copy")
    assert identity(str(tree), size=3) != identity(str(tree), size=4)
    os.rename(tmp_path / "copy/train/bee/3.jpg", tmp_path / "copy/train/bee/9.jpg")
    changed = {key for key, value in identity(f"{tmp_path}/copy").items() if value != identity(str(tree))[key]}
    assert changed == {"names", "files"}
