"""The index of a WebDataset-style tar: where its images lie, and their labels.

A sample is an image KEY.jpg (or another of `SUFFIXES`) and its label: KEY.cls, else the key "label" or "cls" of
KEY.json, else KEY.txt. A label is a number from 0 or the name of a class. The index is kept next to its tar as
NAME.tar.index.npz if the folder is writable, and rebuilt if the tar has changed.
"""

import contextlib
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES
from mvar_jax.errors import InputError
from mvar_jax.files.npz import load_npz, save_npz

INDEX_SUFFIX = ".index.npz"
LABEL_SUFFIXES = {".cls": 200, ".json": 2**20, ".txt": 200}  # by priority; largest size in bytes that is looked at
_ARRAYS = ("offset", "size", "text", "name", "kind", "count", "first")
_VERSION = 2
_END_BYTES = 2**20  # what follows the end mark is looked at up to here: tar fills its last record with zeros


def refuse(message: str, given: object, expected: str) -> InputError:
    """Return the error of data that are not as expected."""
    return InputError(message, field="data.path", given=str(given), expected=expected)


def read_index(path: Path) -> dict[str, np.ndarray]:
    """Return the index of one tar, from its index file if that was built from this very tar.

    `offset`, `size` int64 and `text` (the label), `name` str, each [N], in the tar's order. Of the files that are
    neither images nor labels: `kind` (suffix) str, `count` int64 and `first` (a name) str.

    Raises:
      InputError: the tar is cut, damaged or no tar, or an image has no label.
    """
    status, index_file = path.stat(), path.with_name(path.name + INDEX_SUFFIX)
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    damaged = (OSError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged):
        saved = load_npz(index_file)
        if np.array_equal(saved["stamp"], stamp):
            return {key: saved[key] for key in _ARRAYS}
    index = _scan(path)
    with contextlib.suppress(OSError):  # in a read-only folder every start scans the tar again
        save_npz(index_file, stamp=stamp, **index)
    return index


class _Members:
    """The members of a tar, sorted by what they are for."""

    def __init__(self):
        self.images: dict[str, tuple[int, int, str]] = {}  # by key: offset, size, name
        self.labels: dict[str, tuple[int, str]] = {}  # by key: priority, label
        self.others: dict[str, list[Any]] = {}  # by suffix: number, name of the first

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        key, suffix = _split_key(member.name)
        if suffix in SUFFIXES:
            self.images[key] = (member.offset_data, member.size, member.name)
        elif suffix not in LABEL_SUFFIXES:
            self.others.setdefault(suffix, [0, member.name])[0] += 1
        elif member.size <= LABEL_SUFFIXES[suffix]:
            text = _read_label(suffix, archive.extractfile(member).read())  # type: ignore[union-attr]
            found = (list(LABEL_SUFFIXES).index(suffix), text)
            if text:
                self.labels[key] = min(found, self.labels.get(key, found))


def _scan(path: Path) -> dict[str, np.ndarray]:
    members = _Members()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if member.isfile():
                    members.add(archive, member)
            _check_end(file, archive.offset)  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError, ValueError) as error:
        expected = "a readable tar"
        raise refuse(f"{path} must be {expected} ({error})", path, expected) from None
    images, labels, others = members.images, members.labels, members.others
    for key, (_, _, name) in images.items():
        if key not in labels:
            expected = "a .cls, .txt or .json file (with a label or cls) with the same key"
            image = f"{path}:{name}"
            raise refuse(f"{image} has no label; add {expected}", image, expected)
    offset, size, name = zip(*images.values(), strict=True) if images else ((), (), ())
    count, first = zip(*others.values(), strict=True) if others else ((), ())
    integers = {"offset": offset, "size": size, "count": count}
    texts = {"text": [labels[key][1] for key in images], "name": name, "kind": list(others), "first": first}
    return {
        **{key: np.array(value, np.int64) for key, value in integers.items()},
        **{key: np.array(value, np.str_) for key, value in texts.items()},
    }


def _split_key(name: str) -> tuple[str, str]:
    """Return (key, suffix): a WebDataset key ends at the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}", (dot + suffix).lower()


def _read_label(suffix: str, data: bytes) -> str:
    """Return the label in a file: a number as its shortest decimal digits, or one line of text; "" if it has none."""
    try:
        label: Any = data.decode("utf-8-sig")
        if suffix == ".json":
            content = json.loads(label)
            label = content.get("label", content.get("cls", "")) if isinstance(content, dict) else content
    except ValueError:
        return ""
    if isinstance(label, bool) or not isinstance(label, int | str):
        return ""
    text = str(label).strip()
    with contextlib.suppress(ValueError):
        return str(int(text))
    return "" if "\n" in text else text


def _check_end(file, end: int) -> None:
    """Raise tarfile.ReadError unless the members end with a block of zeros that nothing follows.

    tarfile stops without a word at a header that is cut or damaged, and at zeros between tars joined by `cat`.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        add = "if it is not, add the missing end: head -c 1024 /dev/zero >> FILE"
        raise tarfile.ReadError(f"it ends without an end mark, so it was cut at byte {end:,}; {add}")
    if any(block) or len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is cut or damaged at byte {end:,}, inside a header")
    if any(file.read(_END_BYTES)):
        raise tarfile.ReadError(
            f"more follows its end mark at byte {end:,}; join tars with tar --concatenate, not cat"
        )
