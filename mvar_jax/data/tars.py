"""WebDataset-style tars as a source: PATH/train*.tar and PATH/val*.tar (or in folders PATH/train, PATH/val).

If there are neither, all of PATH/*.tar are training tars. PATH/classes.txt, if it exists, names the classes, one a
line. Tars are read in place, also in an object store, by an index of offsets; see data/tar_index.py.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES
from mvar_jax.data.file_reading import read_or_skip
from mvar_jax.data.file_source import FileSource, note_empty, note_ignored
from mvar_jax.data.names import Names
from mvar_jax.data.tar_index import read_index, refuse
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.limits import allow_open_files
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.progress import track

CLASSES_FILE = "classes.txt"
_NAMES_OF_VAL = ("valid", "validation")  # folders that are not read
_MAX_CLASSES = 10**6  # without names: more are no classes


class TarSource(FileSource):
    """One split; items hold the bytes of an image file.

    Raises:
      InputError: there are no such tars, one is unreadable or lacks a label, or a label is no class.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        self._tars = find_tars(path, split)
        shown = track(self._tars, len(self._tars), f"index {split}", "tar", delay_s=1.0)
        indices = [read_index(tar) for tar in shown]
        self._tar = np.repeat(np.arange(len(indices)), [len(index["offset"]) for index in indices])
        self._offset, self._size = (np.concatenate([index[key] for index in indices]) for key in ("offset", "size"))
        self._names = Names(name for index in indices for name in index["name"].tolist())
        if not len(self._names):
            expected = f"{', '.join(SUFFIXES)} files in its {split} tars"
            raise refuse(f"data.path must hold {expected}, got {str(path)!r}", path, expected)
        self.label_names = _read_classes(as_path(path, "data.path"))
        self.labels = _numbers_of(np.concatenate([index["text"] for index in indices]), self.label_names)
        kinds = Counter[str]()
        for index in indices:
            kinds.update(dict(zip(index["kind"].tolist(), index["count"].tolist(), strict=True)))
        firsts = [
            f"{tar.name}:{index['first'][0]}"
            for tar, index in zip(self._tars, indices, strict=True)
            if len(index["first"])
        ]
        where = f"{path}, {split} tars"
        self.notes = note_ignored(where, kinds, min(firsts, default=""))
        self.notes += note_empty(where, self) if split == "train" else ()
        self._files: dict[int, int] = {}  # descriptors by tar; a worker process opens its own
        if self._tars and not is_store(self._tars[0]):
            allow_open_files(len(self._tars), f"{len(self._tars)} tars of {path}")

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def name_of(self, index: int) -> str:
        """Return TAR:MEMBER."""
        return f"{self._tars[self._tar[index]].name}:{self._names[index]}"

    def _sizes_of(self, numbers: np.ndarray) -> np.ndarray:
        return self._size[numbers]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tar = int(self._tar[index])
        offset, size = int(self._offset[index]), int(self._size[index])
        data = read_or_skip(lambda: self._read(tar, offset, size), self._tars[tar])
        return {"image": data, "label": int(self.labels[index])}

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        if is_store(self._tars[tar]):
            return self._tars[tar].read_range(offset, size)  # type: ignore[attr-defined]
        if (file := self._files.get(tar)) is None:  # if two threads open it at once, one descriptor stays open unused
            file = self._files[tar] = os.open(self._tars[tar], os.O_RDONLY)
        try:
            return os.pread(file, size, offset)
        except OSError:
            self._files.pop(tar, None)  # it may be stale; not closed, since another thread may be reading
            raise


def find_tars(path: str | os.PathLike, split: str) -> list[Path]:
    """Return the tars of a split by name. Raises InputError if there are none."""
    folder = as_path(path, "data.path")
    found = _glob_tars(folder, split)
    if not found and split == "train" and not has_val_tars(folder):
        found = sorted(folder.glob("*.tar"))
    if not found:
        expected = f"a folder that holds {split}*.tar or {split}/*.tar"
        raise refuse(f"data.path must be {expected}, got {str(path)!r}", path, expected)
    return found


def has_val_tars(path: str | os.PathLike) -> bool:
    """Return whether the data set has validation tars. Raises InputError if their folder has another name."""
    folder = as_path(path, "data.path")
    if _glob_tars(folder, "val"):
        return True
    if others := [name for name in _NAMES_OF_VAL if any((folder / name).glob("*.tar"))]:
        expected = "a folder that holds val*.tar or val/*.tar"
        words = f"data.path must be {expected}, got {str(path)!r} with {', '.join(others)}: rename to val"
        raise refuse(words, path, expected)
    return False


def _glob_tars(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}*.tar"), *(folder / split).glob("*.tar")])


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _read_classes(path: Path) -> tuple[str, ...]:
    """Return the lines of classes.txt or, without that file, what the labels of the train tars say.

    Labels that are numbers make classes up to the highest one, labels that are names make a class of each, in order.
    """
    file = path / CLASSES_FILE
    if file.exists():
        return _read_lines(file)
    texts = {text for tar in find_tars(path, "train") for text in np.unique(read_index(tar)["text"]).tolist()}
    names = sorted(text for text in texts if not _is_number(text))
    if not names:
        highest = max(map(int, texts), default=-1)
        if highest >= _MAX_CLASSES:
            allowed = f"below {_MAX_CLASSES}"
            raise InputError(
                f"label must be {allowed}, got {highest}", field="label", given=highest, expected=allowed
            )
        return tuple(map(str, range(highest + 1)))
    if len(names) < len(texts):
        expected = f"all numbers or all names of classes without {CLASSES_FILE}"
        given = f"{min(texts - set(names))} and {names[0]}"
        raise InputError(f"label must be {expected}, got {given}", field="label", given=given, expected=expected)
    return tuple(names)


def _read_lines(file: Path) -> tuple[str, ...]:
    """Return the lines of a text file without space around them and without empty ones at the end."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        expected = "a readable text in UTF-8"
        raise refuse(f"{file} must be {expected} ({shorten(error)})", file, expected) from None
    return tuple(line.strip() for line in text.rstrip().split("\n"))


def _numbers_of(texts: np.ndarray, label_names: tuple[str, ...]) -> np.ndarray:
    """Return the labels int32 of texts: a number is itself, a name the class of that name."""
    number_of = {name: number for number, name in enumerate(label_names)}
    unique, inverse = np.unique(texts, return_inverse=True)
    numbers = []
    for text in unique.tolist():
        number = int(text) if _is_number(text) else number_of.get(text, -1)
        if not 0 <= number < len(label_names):
            allowed = f"from 0 to {len(label_names) - 1} or a name"
            message = f"label must be {allowed} of the classes of {CLASSES_FILE} or of the train tars, got {text}"
            raise InputError(message, field="label", given=text, expected=allowed)
        numbers.append(number)
    return np.array(numbers, np.int32)[inverse]
