"""WebDataset-style tars as a source: PATH/train*.tar and PATH/val*.tar (or in folders PATH/train, PATH/val).

A sample is KEY.jpg (.jpeg, .png, .webp) and KEY.cls, its label as decimal digits. PATH/classes.txt, where it
exists, names the classes, one a line. Tars are read where they lie: an index of offsets is kept beside each as
NAME.tar.index.npz, where that can be written, and made anew when the tar has changed.
"""

import contextlib
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mvar_jax.data.decoding import SUFFIXES, BadImage
from mvar_jax.data.names import Names
from mvar_jax.errors import InputError
from mvar_jax.files.npz import save_npz

INDEX_SUFFIX = ".index.npz"
CLASSES_FILE = "classes.txt"
_MAX_LABEL_BYTES = 20


def _split_key(name: str) -> tuple[str, str]:
    """(key, suffix): a WebDataset key ends at the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}", (dot + suffix).lower()


def _scan(path: Path) -> dict[str, np.ndarray]:
    """The index of one tar: `offset`, `size`, `label` int64 [N], `name` str [N], in the tar's order."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
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
        raise InputError("data.path", str(path), f"a readable tar with labels in .cls files ({error})") from None
    unlabelled = [name for key, (_, _, name) in images.items() if key not in labels]
    if unlabelled:
        raise InputError("data.path", f"{path}:{unlabelled[0]}", "a .cls file of the same key beside the image")
    rows = [(*images[key], labels[key]) for key in images]
    offset, size, name, label = zip(*rows, strict=True) if rows else ((), (), (), ())
    integers = {
        key: np.array(value, np.int64) for key, value in (("offset", offset), ("size", size), ("label", label))
    }
    return {**integers, "name": np.array(name, np.str_)}


def read_index(path: Path) -> dict[str, np.ndarray]:
    """The index of one tar, from the file beside it where that is of this very tar."""
    status, beside = path.stat(), path.with_name(path.name + INDEX_SUFFIX)
    stamp = np.array([status.st_size, status.st_mtime_ns])
    damaged = (OSError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(beside, allow_pickle=False) as saved:
        if np.array_equal(saved["stamp"], stamp):
            return {key: saved[key] for key in ("offset", "size", "label", "name")}
    index = _scan(path)
    with contextlib.suppress(OSError):  # in a read-only folder every start scans the tar again
        save_npz(beside, stamp=stamp, **index)
    return index


class TarSource:
    """One split of a folder of tars; items hold the bytes of an image file.

    Raises:
      InputError: no tars, an unreadable one, an image without its label, or a label without its class.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        self._tars = find_tars(path, split)
        indices = [read_index(tar) for tar in tqdm(self._tars, desc=f"index {split}", unit="tar", delay=1)]
        self._tar = np.repeat(np.arange(len(indices)), [len(index["offset"]) for index in indices])
        self._offset, self._size, self._labels = (
            np.concatenate([index[key] for index in indices]) for key in ("offset", "size", "label")
        )
        self._names = Names(name for index in indices for name in index["name"].tolist())
        if not len(self._names):
            raise InputError("data.path", str(path), f"{', '.join(SUFFIXES)} files in its {split} tars")
        self.label_names = _read_classes(Path(path))
        out_of_range = (self._labels < 0) | (self._labels >= len(self.label_names))
        if out_of_range.any():
            given = int(self._labels[out_of_range][0])
            raise InputError(
                "label", given, f"0 to {len(self.label_names) - 1}, as {CLASSES_FILE} or the train tars have"
            )
        self._files: dict[int, int] = {}  # descriptors by tar; a worker process opens its own

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self._labels

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """TAR:MEMBER."""
        return f"{self._tars[self._tar[index]].name}:{self._names[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tar = int(self._tar[index])
        try:
            if tar not in self._files:  # two threads at once: the loser's is never closed, and does no harm
                self._files[tar] = os.open(self._tars[tar], os.O_RDONLY)
            data = os.pread(self._files[tar], int(self._size[index]), int(self._offset[index]))
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        return {"image": data, "label": int(self._labels[index])}


def find_tars(path: str | os.PathLike, split: str) -> list[Path]:
    """The tars of a split by name. Raises InputError where there is none."""
    found = sorted([*Path(path).glob(f"{split}*.tar"), *(Path(path) / split).glob("*.tar")])
    if not found:
        raise InputError("data.path", str(path), f"a folder that holds {split}*.tar or {split}/*.tar")
    return found


def _read_classes(path: Path) -> tuple[str, ...]:
    """The lines of classes.txt; without it the numbers up to the highest label of train."""
    file = path / CLASSES_FILE
    if file.exists():
        return tuple(file.read_text().rstrip("\n").split("\n"))
    highest = max(int(read_index(tar)["label"].max(initial=-1)) for tar in find_tars(path, "train"))
    return tuple(str(label) for label in range(highest + 1))
