"""Uncompressed .npz files, written atomically: whole arrays, or arrays in pieces that never fit in memory at once."""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvar_jax.files.atomic import replacing

Append = Callable[[np.ndarray], None]


class Pieces(NamedTuple):
    """An array as its shape, its dtype and pieces of its rows in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Iterable[np.ndarray]


def whole(array: np.ndarray) -> Pieces:
    """Return an array as a single piece."""
    return Pieces(array.shape, array.dtype, (array,))


def save_npz(path: Path, **arrays: np.ndarray | Pieces) -> None:
    """Write the bytes that `np.savez` writes. Raises ValueError if pieces do not add up to their shape."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            pieces = array if isinstance(array, Pieces) else whole(np.asarray(array))
            with _open_rows(archive, name, pieces.shape, pieces.dtype) as append:
                for part in pieces.parts:
                    append(part)


@contextlib.contextmanager
def open_npz(path: Path, name: str, shape: tuple[int, ...], dtype) -> Iterator[Append]:
    """Yield a function that appends rows to the one array of a file, which appears if the block succeeds.

    Raises ValueError if the rows do not add up to `shape`.
    """
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
        _open_rows(archive, name, shape, dtype) as append,
    ):
        yield append


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file. Raises ValueError if they need pickle."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def is_whole_npz(path: Path, names: Iterable[str], reads_all: bool = True) -> bool:
    """Return whether a file holds arrays of exactly these names, undamaged; False if it cannot be read.

    reads_all: also compare the checksums of all bytes; else a file that was cut is still found.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            wanted = {f"{name}.npy" for name in names}
            return set(archive.namelist()) == wanted and not (reads_all and archive.testzip())
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error):
        return False


@contextlib.contextmanager
def _open_rows(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype) -> Iterator[Append]:
    dtype, num_rows = np.dtype(dtype), 0
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:

        def append(part: np.ndarray) -> None:
            nonlocal num_rows
            if part.dtype != dtype or part.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{name}: a piece must fit {dtype}{shape}, got {part.dtype}{part.shape}")
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            num_rows += len(part)

        np.lib.format.write_array_header_1_0(file, header)
        yield append
    if num_rows != shape[0]:
        raise ValueError(f"{name}: the pieces must have {shape[0]} rows together, got {num_rows}")
