"""A folder tree as a source: PATH/train/CLASS/* and PATH/val/CLASS/*."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES, BadImage
from mvar_jax.data.names import Names
from mvar_jax.data.protocols import ImageSource
from mvar_jax.errors import InputError


def _refuse(message: str, given: str | os.PathLike, expected: str) -> InputError:
    return InputError(message, field="data.path", given=str(given), expected=expected)


def list_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """Return the class folders of PATH/train by name, without hidden ones. Raises InputError if there are none."""
    train, expected = Path(path) / "train", "a folder that holds train/CLASS/"
    try:
        with os.scandir(train) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._")
    except OSError as error:
        message = f"data.path must be {expected}, got {str(path)!r} ({error.strerror})"
        raise _refuse(message, path, expected) from None
    if not names:
        raise _refuse(f"data.path must be {expected}; {train} has no class folders", path, expected)
    return tuple(names)


def _list_images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    return sorted(name for name in names if not name.startswith("."))


class FolderSource(ImageSource):
    """One split; items hold the bytes of a JPEG, PNG or WebP file. Classes are the folders of `train`, by name.

    Raises:
      InputError: the folders are missing, hold no images, or `split` has a class that `train` does not have.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        self._folder = Path(path) / split
        self.label_names = list_classes(path)
        if not self._folder.is_dir():
            expected = f"a folder that holds {split}/CLASS/ and train/CLASS/"
            raise _refuse(f"data.path must be {expected}; {self._folder} does not exist", path, expected)
        found = {entry.name for entry in os.scandir(self._folder) if entry.is_dir() and entry.name[0] not in "._"}
        unknown = sorted(found - set(self.label_names))
        if unknown:
            extra = self._folder / unknown[0]
            message = f"{extra} must be one of the classes of {path}/train; remove it or add its training images"
            raise _refuse(message, extra, f"one of the classes of {path}/train")
        per_class = [_list_images(self._folder / name) if name in found else [] for name in self.label_names]
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
            with open(f"{self._folder}/{self.name_of(index)}", "rb") as file:
                data = file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        return {"image": data, "label": int(self._labels[index])}
