"""Image files in any folder as a source: no classes, sub-folders included, in the order of the names."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import SUFFIXES, BadImage
from mvar_jax.data.file_reading import read_or_skip, size_on_disk
from mvar_jax.data.file_source import note_figures
from mvar_jax.data.protocols import ImageSource, digest
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import is_store
from mvar_jax.processes.holding import find_figures

NUM_THREADS = 16  # a network file system answers slowly, but many at once


class ImageFiles(ImageSource):
    """The image files of a folder, each with label 0; items hold the bytes of a file.

    Args:
      path: an image file, or a folder of them and of sub-folders; hidden files are left out.
      out: a folder whose files are left out.
      field: name of the option, for the error.

    Raises:
      InputError: there are no image files.
    """

    label_names = ("images",)

    def __init__(self, path: Path, out: Path, field: str = "images"):
        self._folder, self._names, self.notes = find_images(path, out, field)

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """Return the name of the file, relative to the folder."""
        return self._names[index]

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of the names and, if asked for, of the sizes; see `ImageSource`."""
        names = [self._names[number] for number in numbers.tolist()]
        return digest([*names, str(_sizes_of(self._folder, names))] if with_sizes else names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_file(self._folder / self._names[index]), "label": 0}


def _sizes_of(folder: Path, names: list[str]) -> list[int]:
    """Return the size of each file in bytes, -1 of one that is gone."""
    if is_store(folder):  # one listing for all
        sizes = folder.find_sizes()  # type: ignore[attr-defined]
        return [sizes.get(name, -1) for name in names]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(lambda name: size_on_disk(folder / name), names))


def find_images(path: Path, out: Path, field: str = "images") -> tuple[Path, list[str], tuple[str, ...]]:
    """Return (folder, names of its images in order, notes); a single file alone.

    Grids and other figures that one of our commands wrote beside its images are left out, with a note.

    out: a folder whose files are left out. Raises InputError if there are none.
    """
    expected, reason, names = f"an image file or a folder of {', '.join(SUFFIXES)} files", "", []
    notes: tuple[str, ...] = ()
    try:
        if path.is_dir():
            found = _list_files(path, out)
            figures = find_figures(found)
            others = [name for name in found if not name.lower().endswith(SUFFIXES)]
            names = sorted({*found} - {*others} - figures)
            notes = note_figures(path, figures)
            if others:
                words = f"{len(others)} of {len(found)} files left out, no images by their names, such as {others[0]}"
                notes += (f"{path}: {words}",)
            if figures and not names:
                reason = " (its images show several side by side; give reconstructions.npz if it holds one)"
        elif path.exists():
            return path.parent, [path.name], ()
    except OSError as error:
        reason = f" ({error.filename}: {shorten(error)})"
    if not names:
        message = f"--{field} must be {expected}, got {str(path)!r}{reason}"
        raise InputError(message, field=field, given=str(path), expected=expected)
    return path, names, notes


def _list_files(folder: Path, out: Path) -> list[str]:
    """Return the names of the files below a folder, relative to it, in order, without hidden ones and those of `out`.

    Folders that links lead to count once. Raises OSError if a folder cannot be read.
    """
    if is_store(folder):
        names = [name for name in folder.find() if not str(folder / name).startswith(f"{out}/")]  # type: ignore
    else:
        names, seen = [], {os.path.realpath(out)}
        for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            names += [os.path.relpath(os.path.join(parent, file), folder) for file in files]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split(os.sep)))


def _raise(error: OSError) -> None:
    raise error


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises as `read_or_skip`, and BadImage if it is no file."""

    def read() -> bytes:
        if not (is_store(path) or stat.S_ISREG(path.stat().st_mode)):  # a pipe would never end
            raise BadImage("is no file")
        return path.read_bytes()

    return read_or_skip(read, path)
