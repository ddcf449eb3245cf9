"""A folder tree as a source, on this machine or in an object store.

PATH/train/CLASS/* and PATH/val/CLASS/*, with folders inside a class folder if there are any. Without PATH/train and
PATH/val, PATH itself is the training folder. A folder that holds images but no class folders is one class. A flat
PATH/val of several classes takes its labels from a file; see data/label_file.py.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES
from mvar_jax.data.file_reading import read_or_skip, size_on_disk
from mvar_jax.data.file_source import FileSource, list_some, note_empty, note_figures, note_ignored
from mvar_jax.data.label_file import read_labels
from mvar_jax.data.names import Names
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.processes.holding import find_figures

ONE_CLASS = "images"  # name of the class of a folder without class folders
LABELS_FILE = "val.txt"
_NAMES_OF_TRAIN = ("train", "training")
_NAMES_OF_SPLITS = (*_NAMES_OF_TRAIN, "val", "valid", "validation")  # in any case: no classes
_NUM_STAT_THREADS = 16  # a network file system answers slowly, but many at once


def _refuse(message: str, given: str | os.PathLike, expected: str) -> InputError:
    return InputError(message, field="data.path", given=str(given), expected=expected)


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Raise a folder that cannot be read as InputError."""
    try:
        yield
    except OSError as error:
        expected = "a folder that can be read"
        message = f"data.path must be {expected}, got {str(path)!r}: {error.filename} ({shorten(error)})"
        raise _refuse(message, path, expected) from None


def train_folder(path: str | os.PathLike) -> Path:
    """Return PATH/train, or PATH if it has neither train nor val.

    Raises InputError if there is no such folder, or if one of the two has another name, such as valid.
    """
    root = as_path(path, "data.path")
    has_train = (root / "train").is_dir()
    if has_train and (root / "val").is_dir():
        return root / "train"
    expected = "a folder that holds train/CLASS/"
    if not root.is_dir():
        raise _refuse(f"data.path must be {expected}, got {str(path)!r}", path, expected)
    with _naming(path):
        splits = [name for name in _list_folders(root) if name.lower() in _NAMES_OF_SPLITS]
    splits = [name for name in splits if not has_train or name.lower() not in _NAMES_OF_TRAIN]
    if has_train and not splits:
        return root / "train"
    if splits:
        message = f"data.path must be {expected}, got {str(path)!r} with {', '.join(splits)}: rename to train and val"
        raise _refuse(message, path, expected)
    return root


def has_val_folder(path: str | os.PathLike) -> bool:
    """Return whether the data set has a validation folder. Raises InputError as `train_folder`."""
    root = as_path(path, "data.path")
    return train_folder(path) != root and (root / "val").is_dir()


def list_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """Return the class folders of the training folder, by number if all their names are numbers, else by name.

    Without hidden ones; ONE_CLASS if it is flat. Raises InputError if it has neither class folders nor images.
    """
    with _naming(path):
        train = train_folder(path)
        names = _list_folders(train)
        if names:
            return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)
        if any(name.lower().endswith(SUFFIXES) for name in _names_in(train)):
            return (ONE_CLASS,)
    expected = "a folder that holds train/CLASS/"
    raise _refuse(f"data.path must be {expected}; {train} has no class folders and no images", path, expected)


def order_classes(names: tuple[str, ...], class_order: Sequence[str]) -> tuple[str, ...]:
    """Return the classes as `class_order` lists them, unless it is empty. Raises InputError if it lists others."""
    if not class_order:
        return names
    if sorted(class_order) != sorted(names):
        different = ", ".join(sorted(set(class_order) ^ set(names))[:5]) or "one listed twice"
        message = (
            f"data.class_order must list the {len(names)} classes of data.path, each once; different: {different}"
        )
        raise InputError(message, field="data.class_order", given=class_order, expected=f"the {len(names)} classes")
    return tuple(class_order)


def _list_folders(folder: Path) -> list[str]:
    return [name for name in _names_of_folders(folder) if name[0] not in "._"]


def _names_of_folders(folder: Path) -> list[str]:
    if is_store(folder):
        return folder.list_folders()  # type: ignore[attr-defined]
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _names_in(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if not path.name.startswith("."))


def _find_files(folder: Path) -> dict[str, int]:
    """Return the files below by name relative to the folder, without hidden ones; sizes are -1 on a disk."""
    if is_store(folder):  # one listing for all
        found = folder.find_sizes()  # type: ignore[attr-defined]
        found = {name: size for name, size in found.items() if "/." not in f"/{name}"}
    else:
        found = dict.fromkeys(_walk(str(folder), "", ()), -1)
    return {name: size for name, size in found.items() if name[0] != "_" or "/" not in name}


def find_images(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return (image files below a folder, by name relative to it and in order, notes).

    Hidden ones are left out, and figures that one of our commands wrote, with a note.
    """
    found = _find_files(folder)
    figures = find_figures(found)
    names = sorted(name for name in found if name.lower().endswith(SUFFIXES) and name not in figures)
    return names, note_figures(folder, figures)


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the files below; links are followed, but not to a folder that they lie in."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # below the class folders a link with such a suffix is not asked what it is: there may be millions
            is_image = entry.name.lower().endswith(SUFFIXES)
            if not entry.is_dir(follow_symlinks=not (is_image and prefix)):
                yield prefix + entry.name
            elif not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above)


class FolderSource(FileSource):
    """One split; items hold the bytes of an image file. Classes are the folders of the training folder.

    Args:
      class_order: their names in the order of the labels; empty for that of `list_classes`.
      val_labels: file of the labels of a flat validation folder; "" for PATH/val.txt if it exists.

    Raises:
      InputError: the folders are missing or unreadable, hold no images, `split` has a class that `train` does not
        have, or a flat folder of several classes has no labels.
    """

    def __init__(self, path: str | os.PathLike, split: str, class_order: Sequence[str] = (), val_labels: str = ""):
        self.label_names = order_classes(list_classes(path), class_order)
        with _naming(path):
            self._open(path, split, val_labels)

    def _open(self, path: str | os.PathLike, split: str, val_labels: str) -> None:
        self._folder = train_folder(path) if split == "train" else as_path(path, "data.path") / split
        if not self._folder.is_dir():
            expected = f"a folder that holds {split}/CLASS/ and train/CLASS/"
            raise _refuse(f"data.path must be {expected}; {self._folder} does not exist", path, expected)
        labels_file = _labels_file(self._folder, val_labels) if split == "val" else None
        found = _find_files(self._folder)
        is_image = lambda name: name.lower().endswith(SUFFIXES)
        images = sorted(filter(is_image, found))
        self._is_flat = (
            labels_file is not None or self.label_names == (ONE_CLASS,) and not _list_folders(self._folder)
        )
        if self._is_flat:
            outside: list[str] = []
            self.labels = np.zeros(len(images), np.int32)
            if labels_file is not None:
                self.labels, unused = read_labels(labels_file, images, self.label_names)
                self.notes += (f"{labels_file}: {unused:,} lines name no image",) if unused else ()
        else:
            images, outside = self._sort_by_class(path, split, images)
        self._names = Names(images if self._is_flat else (name.partition("/")[2] for name in images))
        self._sizes = np.array([found[name] for name in images], np.int64) if is_store(self._folder) else None
        self.notes += self._make_notes(split, [name for name in found if not is_image(name)], outside)
        if not len(self._names):
            expected = f"{', '.join(SUFFIXES)} files in its class folders"
            raise _refuse(f"{self._folder} must hold {expected}; there are none", self._folder, expected)

    def _sort_by_class(self, path, split: str, images: list[str]) -> tuple[list[str], list[str]]:
        """Set the labels; return (the images of the class folders, those outside)."""
        unknown = sorted(set(_list_folders(self._folder)) - set(self.label_names))
        if unknown:
            extra = self._folder / unknown[0]
            message = f"{extra} must be one of the classes of {path}/train; remove it or add its training images"
            raise _refuse(message, extra, f"one of the classes of {path}/train")
        by_class: dict[str, list[str]] = {name: [] for name in self.label_names}
        outside = []
        for name in images:
            folder, slash, _ = name.partition("/")
            if not slash:
                outside.append(name)
            else:
                by_class[folder].append(name)
        if outside and len(outside) == len(images) and split == "val":
            expected = f"class folders, or a file with its labels, {self._folder.with_name(LABELS_FILE)}"
            message = f"{self._folder} must have {expected} or data.val_labels=FILE"
            raise _refuse(message, self._folder, expected)
        counts = [len(names) for names in by_class.values()]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return list(itertools.chain.from_iterable(by_class.values())), outside

    def _make_notes(self, split: str, others: Sequence[str], outside: Sequence[str]) -> tuple[str, ...]:
        notes = note_ignored(
            self._folder, Counter(PurePosixPath(name).suffix.lower() for name in others), min(others, default="")
        )
        if outside:
            words = f"{len(outside):,} images outside the class folders are ignored (first: {min(outside)})"
            notes += (f"{self._folder}: {words}",)
        left_out = [name for name in _names_of_folders(self._folder) if name[0] == "_"]
        if left_out:
            notes += (f"{self._folder}: folders that begin with _ are ignored: {list_some(left_out)}",)
        return notes + (note_empty(self._folder, self) if split == "train" else ())

    def name_of(self, index: int) -> str:
        """Return CLASS/FILE, or FILE in a flat folder."""
        name = self._names[index]
        return name if self._is_flat else f"{self.label_names[self.labels[index]]}/{name}"

    def _sizes_of(self, numbers: np.ndarray) -> np.ndarray:
        if self._sizes is not None:
            return self._sizes[numbers]
        parts = np.array_split(numbers, max(1, min(4 * _NUM_STAT_THREADS, len(numbers) // 256)))
        with ThreadPoolExecutor(_NUM_STAT_THREADS) as threads:
            return np.concatenate(list(threads.map(self._stat, parts)))

    def _stat(self, numbers: np.ndarray) -> np.ndarray:
        return np.array(
            [size_on_disk(f"{self._folder}/{self.name_of(number)}") for number in numbers.tolist()], np.int64
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._folder / self.name_of(index)
        return {"image": read_or_skip(path.read_bytes, path), "label": int(self.labels[index])}


def _labels_file(val: Path, val_labels: str) -> Path | None:
    if val_labels:
        return as_path(val_labels, "data.val_labels")
    file = val.with_name(LABELS_FILE)
    return file if not _list_folders(val) and file.is_file() else None
