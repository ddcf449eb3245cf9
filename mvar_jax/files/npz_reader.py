"""Reading of .npz files that others wrote: headers first, then arrays, whole or some rows; nothing is unpickled."""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path

MAX_ARRAYS = 10_000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as numpy writes them
# values of `dtype.kind`
KINDS = {"b": "truth values", "f": "floats", "i": "integers", "u": "unsigned integers", "U": "text"}
IS_ENCRYPTED = 1  # a bit of a member's flags
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """What an array's header says, checked against the size of its member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An open .npz file. Opening and reading raise InputError if it is damaged, cut, encrypted or needs pickle.

    Attributes:
      headers: of all arrays by name.
    """

    def __init__(self, field: str, path: str | os.PathLike):
        self.field, self.path = field, as_path(path, field)
        self._opened = contextlib.ExitStack()
        try:
            if self.path.exists() and not self.path.is_file():  # a pipe would block
                raise self.refuse("it is not a regular file")
            file = self._opened.enter_context(self.path.open("rb"))
            self._zip = self._opened.enter_context(zipfile.ZipFile(file))
            names = [name for name in self._zip.namelist() if name.endswith(".npy")]
            if len(names) > MAX_ARRAYS:
                raise self.refuse(f"it has {len(names)} arrays, more than {MAX_ARRAYS}")
            if odd := next((name for name in names if not name.isprintable()), None):
                raise self.refuse(f"it holds a member named {odd!a}")
            self.headers = {name.removesuffix(".npy"): self._read_header(name) for name in names}
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | zipfile.BadZipFile | NotImplementedError):
                raise self.refuse(shorten(error)) from None
            if isinstance(error, UnicodeDecodeError):
                raise self.refuse(f"a member's name is not UTF-8 ({shorten(error)})") from None
            raise

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    def refuse(self, reason: str) -> InputError:
        """Return an InputError with the reason why the file cannot be used."""
        message = f"{self.field}={self.path} is not a usable .npz file: {reason}"
        return InputError(message, field=self.field, given=str(self.path), expected="a whole .npz file")

    def read(self, name: str, shape: tuple[int | None, ...], kinds: str = "f") -> np.ndarray:
        """Return an array. Raises InputError if it is missing or of another shape or kind of dtype.

        Args:
          shape: what it must have; None allows any size.
          kinds: allowed values of `dtype.kind`.
        """
        header = self.header(name, shape, kinds)
        with self._naming(name), self._zip.open(f"{name}.npy") as file:
            self._take(name, file, self._size(name) - header.num_bytes)
            data = self._take(name, file, header.num_bytes)
        return np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.is_fortran else "C")

    def row_reader(self, name: str) -> Callable[[range], np.ndarray]:
        """Return a function from numbers to the rows of an array; ascending ones are read in one pass."""
        header = self.headers[name]
        if header.is_fortran and len(header.shape) > 1:
            raise self.refuse(f"{name} is stored by columns; store it again with numpy.ascontiguousarray")
        row_bytes = header.num_bytes // max(header.shape[0], 1)
        begin = self._size(name) - header.num_bytes
        with self._naming(name):
            file = self._opened.enter_context(self._zip.open(f"{name}.npy"))
            self._take(name, file, begin)

        def read(rows: range) -> np.ndarray:
            with self._naming(name):
                if file.tell() != (place := begin + rows.start * row_bytes):
                    file.seek(place)  # from here on the checksum is not compared any more
                data = self._take(name, file, len(rows) * row_bytes)
            return np.frombuffer(data, header.dtype).reshape(len(rows), *header.shape[1:])

        return read

    def checksum(self, name: str) -> str:
        """Return the CRC-32 of an array and its header, which the file's directory holds."""
        return f"{self._zip.getinfo(f'{name}.npy').CRC:08x}"

    def header(self, name: str, shape: tuple[int | None, ...], kinds: str) -> Header:
        """Return the header of an array. Raises InputError as `read` does; no value is read."""
        header = self.headers.get(name)
        if header is None:
            raise self.refuse(f"it has no array {name}")
        fits = len(header.shape) == len(shape)
        fits = fits and all(want in (None, n) for want, n in zip(shape, header.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.refuse(f"{name} must have shape [{wanted}], got {header.dtype} {list(header.shape)}")
        if header.dtype.kind not in kinds:
            wanted = " or ".join(KINDS[kind] for kind in kinds)
            raise self.refuse(f"{name} must be an array of {wanted}, got {header.dtype} {list(header.shape)}")
        return header

    def _read_header(self, name: str) -> Header:
        info = self._zip.getinfo(name)
        if info.compress_type not in METHODS or info.flag_bits & IS_ENCRYPTED:
            raise self.refuse(f"{name} must be stored or deflated, and not encrypted")
        try:
            with self._zip.open(name) as file:
                version = np.lib.format.read_magic(file)
                if version not in HEADER_READERS:
                    raise ValueError(f"its format {version} is unknown")
                read = HEADER_READERS[version]
                shape, is_fortran, dtype = read(file)
                begin = file.tell()
        except Exception as error:  # numpy lets Python's tokenizer and parser read a header
            raise self.refuse(f"{name}: {shorten(error)}") from None
        header = Header(shape, dtype, is_fortran)
        if dtype.hasobject:
            raise self.refuse(f"{name} holds Python objects, which are not read")
        if min(shape, default=0) < 0 or dtype.itemsize == 0:
            raise self.refuse(f"{name} has the impossible shape {list(shape)} or dtype {dtype}")
        if begin + header.num_bytes != info.file_size:
            raise self.refuse(f"{name} claims {header.num_bytes} bytes and has {info.file_size - begin}")
        return header

    def _size(self, name: str) -> int:
        return self._zip.getinfo(f"{name}.npy").file_size

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Raise an error of the file as InputError that names the array."""
        try:
            yield
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise self.refuse(f"{name}: {shorten(error)}") from None

    def _take(self, name: str, file: IO[bytes], num_bytes: int) -> bytes:
        data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.refuse(f"{name} is cut")
        return data
