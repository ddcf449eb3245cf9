"""A folder tree as a source: PATH/train/CLASS/* and PATH/val/CLASS/*, on this machine or in an object store."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES, BadImage
from mvar_jax.data.names import Names
from mvar_jax.data.protocols import ImageSource
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path, is_store


def _refuse(message: str, given: str | os.PathLike, expected: str) -> InputError:
    return InputError(message, field="data.path", given=str(given), expected=expected)


def list_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """Return the class folders of PATH/train, by number if all their names are numbers, else by name.

    Without hidden ones. Raises InputError if there are none.
    """
    train, expected = as_path(path, "data.path") / "train", "a folder that holds train/CLASS/"
    try:
        names = _list_folders(train)
    except OSError as error:
        message = f"data.path must be {expected}, got {str(path)!r} ({shorten(error)})"
        raise _refuse(message, path, expected) from None
    if not names:
        raise _refuse(f"data.path must be {expected}; {train} has no class folders", path, expected)
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


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
    if is_store(folder):
        return [name for name in folder.list_folders() if name[0] not in "._"]  # type: ignore[attr-defined]
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._")


def _list_images(split: Path, classes: Sequence[str]) -> list[list[str]]:
    """Return the sorted image names of each class folder."""
    if is_store(split):  # one listing for all: a folder is no more than a prefix there
        by_class: dict[str, list[str]] = {name: [] for name in classes}
        for name in split.find():  # type: ignore[attr-defined]
            folder, _, image = name.partition("/")
            if folder in by_class and "/" not in image:
                by_class[folder].append(image)
        listed = list(by_class.values())
    else:
        listed = [os.listdir(split / name) if (split / name).is_dir() else [] for name in classes]
    is_image = lambda name: name.lower().endswith(SUFFIXES) and not name.startswith(".")
    return [sorted(filter(is_image, names)) for names in listed]


class FolderSource(ImageSource):
    """One split; items hold the bytes of a JPEG, PNG or WebP file. Classes are the folders of `train`.

    Args:
      class_order: their names in the order of the labels; empty for that of `list_classes`.

    Raises:
      InputError: the folders are missing, hold no images, or `split` has a class that `train` does not have.
    """

    def __init__(self, path: str | os.PathLike, split: str, class_order: Sequence[str] = ()):
        self._folder = as_path(path, "data.path") / split
        self.label_names = order_classes(list_classes(path), class_order)
        if not self._folder.is_dir():
            expected = f"a folder that holds {split}/CLASS/ and train/CLASS/"
            raise _refuse(f"data.path must be {expected}; {self._folder} does not exist", path, expected)
        unknown = sorted(set(_list_folders(self._folder)) - set(self.label_names))
        if unknown:
            extra = self._folder / unknown[0]
            message = f"{extra} must be one of the classes of {path}/train; remove it or add its training images"
            raise _refuse(message, extra, f"one of the classes of {path}/train")
        per_class = _list_images(self._folder, self.label_names)
        self._labels = np.repeat(np.arange(len(per_class), dtype=np.int32), [len(names) for names in per_class])
        self._names = Names(name for names in per_class for name in names)
        if not len(self._names):
            expected = f"{', '.join(SUFFIXES)} files in its class folders"
            raise _refuse(f"{self._folder} must hold {expected}; there are none", self._folder, expected)

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """Return CLASS/FILE."""
        return f"{self.label_names[self._labels[index]]}/{self._names[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            data = (self._folder / self.name_of(index)).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {shorten(error)}") from None
        return {"image": data, "label": int(self._labels[index])}
