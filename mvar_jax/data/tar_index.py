"""The index of a WebDataset-style tar: where its images lie, and their labels.

A sample is an image KEY.jpg (or another of `SUFFIXES`) and its label: KEY.cls, else the key "label" or "cls" of
KEY.json, else KEY.txt. A label is a number from 0 or the name of a class. Of several images of one key the first by
`SUFFIXES` is the sample, as if it were asked for by "jpg;jpeg;png": the others may be masks. The index is kept next
to its tar as NAME.tar.index.npz if the folder is writable, and rebuilt if the tar has changed.
"""

import contextlib
import json
import tarfile
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES
from mvar_jax.errors import InputError
from mvar_jax.files.npz import load_npz, save_npz

INDEX_SUFFIX = ".index.npz"
LABEL_SUFFIXES = {".cls": 200, ".json": 2**20, ".txt": 200}  # by priority; largest size in bytes that is looked at
_ARRAYS = ("offset", "size", "text", "name", "kind", "count", "first")
_VERSION = 3
_END_BYTES = 2**20  # what follows the end mark is looked at up to here: tar fills its last record with zeros


def refuse(message: str, given: object, expected: str) -> InputError:
    """Return the error of data that are not as expected."""
    return InputError(message, field="data.path", given=str(given), expected=expected)


def read_index(path: Path) -> dict[str, np.ndarray]:
    """Return the index of one tar, from its index file if that was built from this very tar.

    `offset`, `size` int64 and `text` (the label), `name` str, each [N], in the tar's order. Of the files that are
    neither images nor labels: `kind` (suffix or words) str, `count` int64 and `first` (a name) str.

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
    """The members of a tar, sorted by what they are for. A member that is appended again replaces the earlier one.

    Args:
      targets: names of the members that hard links lead to, whose places are kept.
    """

    def __init__(self, targets: Set[str] = frozenset()):
        self.images: dict[str, tuple[int, int, str]] = {}  # by key: offset, size, name
        self.labels: dict[str, dict[str, str]] = {suffix: {} for suffix in LABEL_SUFFIXES}  # by suffix and key
        self.others: dict[str, list[Any]] = {}  # by kind: number, name of the first
        self.linked: set[str] = set()
        self._targets, self._places = targets, dict[str, tuple[int, int]]()

    def add(self, file: IO[bytes], member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        place = self._place_of(member)
        if place is None:
            self._ignore("symbolic links" if member.issym() else "special files", member.name)
            return
        if member.name in self._targets:
            self._places[member.name] = place
        offset, size = place
        key, suffix = _split_key(member.name)
        if suffix in SUFFIXES:
            self._add_image(key, (offset, size, member.name))
        elif suffix not in LABEL_SUFFIXES:
            self._ignore(suffix, member.name)
        elif size > LABEL_SUFFIXES[suffix]:
            self.labels[suffix][key] = ""
        else:
            file.seek(offset)
            self.labels[suffix][key] = _read_label(suffix, file.read(size))

    def _place_of(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        """Return offset and size of a member's bytes, of its target's if it is a hard link; None if it has none."""
        if not member.islnk():
            return (member.offset_data, member.size) if member.isfile() and not member.issparse() else None
        self.linked.add(member.linkname)
        if self._targets and member.linkname not in self._places:
            raise tarfile.ReadError(f"{member.name} is a hard link to {member.linkname}, which is not before it")
        return self._places.get(member.linkname, (0, 0))

    def _add_image(self, key: str, found: tuple[int, int, str]) -> None:
        """Keep the image of a key. Of several formats the first in SUFFIXES is taken: a .png is often a mask."""
        kept = self.images.get(key, found)
        first, other = sorted((found, kept), key=lambda image: SUFFIXES.index(_split_key(image[2])[1]))
        self.images[key] = first
        if first[2] != other[2]:
            self._ignore(f"{_split_key(other[2])[1]} beside another image of the key", other[2])

    def _ignore(self, kind: str, name: str) -> None:
        self.others.setdefault(kind, [0, name])[0] += 1

    def label_of(self, key: str) -> str:
        """Return the label of an image, "" if it has none."""
        return next((text for texts in self.labels.values() if (text := texts.get(key))), "")


def _read_members(path: Path, targets: Set[str] = frozenset()) -> _Members:
    members = _Members(targets)
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            members.add(file, member)
        _check_end(file, archive.offset)  # type: ignore[attr-defined]
    return members


def _scan(path: Path) -> dict[str, np.ndarray]:
    try:
        members = _read_members(path)
        if members.linked:  # hard links are rare, and the places of all members take memory
            members = _read_members(path, members.linked)
    except (tarfile.TarError, OSError, ValueError) as error:
        expected = "a readable tar"
        raise refuse(f"{path} must be {expected} ({error})", path, expected) from None
    images, others = members.images, members.others
    labels = list(map(members.label_of, images))
    for (_, _, name), label in zip(images.values(), labels, strict=True):
        if not label:
            expected = "a .cls, .txt or .json file (with a label or cls) with the same key"
            image = f"{path}:{name}"
            raise refuse(f"{image} has no label; add {expected}", image, expected)
    offset, size, name = zip(*images.values(), strict=True) if images else ((), (), ())
    count, first = zip(*others.values(), strict=True) if others else ((), ())
    integers = {"offset": offset, "size": size, "count": count}
    texts = {"text": labels, "name": name, "kind": list(others), "first": first}
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
