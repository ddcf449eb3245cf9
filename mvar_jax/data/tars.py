"""WebDataset-style tars as a source: PATH/train*.tar and PATH/val*.tar (or in folders PATH/train, PATH/val).

A sample is KEY.jpg (.jpeg, .png, .webp) and KEY.cls, its label as decimal digits. PATH/classes.txt, if it
exists, names the classes, one a line. Tars are read in place, also in an object store, by an index of offsets. The
index is kept next to its tar as NAME.tar.index.npz if the folder is writable, and rebuilt if the tar has changed.
"""

import contextlib
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES, BadImage
from mvar_jax.data.names import Names
from mvar_jax.data.protocols import ImageSource
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.npz import load_npz, save_npz
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.progress import track

INDEX_SUFFIX = ".index.npz"
CLASSES_FILE = "classes.txt"
_MAX_LABEL_BYTES = 20


def _refuse(message: str, given: object, expected: str) -> InputError:
    return InputError(message, field="data.path", given=str(given), expected=expected)


def _split_key(name: str) -> tuple[str, str]:
    """Return (key, suffix): a WebDataset key ends at the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}", (dot + suffix).lower()


def _scan(path: Path) -> dict[str, np.ndarray]:
    """Return the index of one tar: `offset`, `size`, `label` int64 [N], `name` str [N], in the tar's order."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile keeps every header otherwise
                key, suffix = _split_key(member.name)
                if not member.isfile():
                    continue
                if suffix in SUFFIXES:
                    images[key] = (member.offset_data, member.size, member.name)
                elif suffix == ".cls" and member.size <= _MAX_LABEL_BYTES:
                    labels[key] = int(archive.extractfile(member).read())
    except (tarfile.TarError, OSError, ValueError) as error:
        expected = "a readable tar with numbers as labels in .cls files"
        raise _refuse(f"{path} must be {expected} ({error})", path, expected) from None
    unlabelled = [name for key, (_, _, name) in images.items() if key not in labels]
    if unlabelled:
        image = f"{path}:{unlabelled[0]}"
        raise _refuse(f"{image} has no label; add a .cls file with the same key", image, "a .cls file with its key")
    rows = [(*images[key], labels[key]) for key in images]
    offset, size, name, label = zip(*rows, strict=True) if rows else ((), (), (), ())
    integers = {
        key: np.array(value, np.int64) for key, value in (("offset", offset), ("size", size), ("label", label))
    }
    return {**integers, "name": np.array(name, np.str_)}


def read_index(path: Path) -> dict[str, np.ndarray]:
    """Return the index of one tar, from its index file if that was built from this very tar."""
    status, index_file = path.stat(), path.with_name(path.name + INDEX_SUFFIX)
    stamp = np.array([status.st_size, status.st_mtime_ns])
    damaged = (OSError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged):
        saved = load_npz(index_file)
        if np.array_equal(saved["stamp"], stamp):
            return {key: saved[key] for key in ("offset", "size", "label", "name")}
    index = _scan(path)
    with contextlib.suppress(OSError):  # in a read-only folder every start scans the tar again
        save_npz(index_file, stamp=stamp, **index)
    return index


class TarSource(ImageSource):
    """One split; items hold the bytes of an image file.

    Raises:
      InputError: there are no such tars, one is unreadable or lacks a label, or a label is out of range.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        self._tars = find_tars(path, split)
        shown = track(self._tars, len(self._tars), f"index {split}", "tar", delay_s=1.0)
        indices = [read_index(tar) for tar in shown]
        self._tar = np.repeat(np.arange(len(indices)), [len(index["offset"]) for index in indices])
        self._offset, self._size, self._labels = (
            np.concatenate([index[key] for index in indices]) for key in ("offset", "size", "label")
        )
        self._names = Names(name for index in indices for name in index["name"].tolist())
        if not len(self._names):
            expected = f"{', '.join(SUFFIXES)} files in its {split} tars"
            raise _refuse(f"data.path must hold {expected}, got {str(path)!r}", path, expected)
        self.label_names = _read_classes(as_path(path, "data.path"))
        out_of_range = (self._labels < 0) | (self._labels >= len(self.label_names))
        if out_of_range.any():
            given, allowed = int(self._labels[out_of_range][0]), f"0 to {len(self.label_names) - 1}"
            raise InputError(
                f"label must be from {allowed}, the classes of {CLASSES_FILE} or of the train tars, got {given}",
                field="label",
                given=given,
                expected=allowed,
            )
        self._files: dict[int, int] = {}  # descriptors by tar; a worker process opens its own

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """Return TAR:MEMBER."""
        return f"{self._tars[self._tar[index]].name}:{self._names[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tar = int(self._tar[index])
        offset, size = int(self._offset[index]), int(self._size[index])
        try:
            if is_store(self._tars[tar]):
                data = self._tars[tar].read_range(offset, size)  # type: ignore[attr-defined]
                return {"image": data, "label": int(self._labels[index])}
            if tar not in self._files:  # if two threads open it at once, one descriptor stays open unused
                self._files[tar] = os.open(self._tars[tar], os.O_RDONLY)
            data = os.pread(self._files[tar], size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {shorten(error)}") from None
        return {"image": data, "label": int(self._labels[index])}


def find_tars(path: str | os.PathLike, split: str) -> list[Path]:
    """Return the tars of a split by name. Raises InputError if there are none."""
    folder = as_path(path, "data.path")
    found = sorted([*folder.glob(f"{split}*.tar"), *(folder / split).glob("*.tar")])
    if not found:
        expected = f"a folder that holds {split}*.tar or {split}/*.tar"
        raise _refuse(f"data.path must be {expected}, got {str(path)!r}", path, expected)
    return found


def _read_classes(path: Path) -> tuple[str, ...]:
    """Return the lines of classes.txt or, without that file, the numbers up to the highest label of train."""
    file = path / CLASSES_FILE
    if file.exists():
        return tuple(file.read_text().rstrip("\n").split("\n"))
    highest = max(int(read_index(tar)["label"].max(initial=-1)) for tar in find_tars(path, "train"))
    return tuple(str(label) for label in range(highest + 1))
