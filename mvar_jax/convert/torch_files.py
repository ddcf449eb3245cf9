"""Files of torch.save, zipped (torch >= 1.6) or in the older format, read without torch.

A tensor is a small record until it is read, so a training checkpoint costs only the memory of the tensors used.
"""

import abc
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from mvar_jax.convert.files import AGAIN, WeightsFile, explain
from mvar_jax.convert.pickles import PickleError, load_pickle
from mvar_jax.convert.tensors import STORAGES, Storage, Tensor
from mvar_jax.errors import shorten

MAX_PICKLE_BYTES = 8 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
PACKED_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def as_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a Tensor's dtype."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class TorchFile(WeightsFile):
    """An open file of torch.save; its two formats differ in where storages lie."""

    is_big_endian = False

    def __init__(self, field: str, path: Path, file: BinaryIO):
        super().__init__(field, path)
        self._opened.enter_context(file)
        self._num_read = 0
        self._last: tuple[Storage, np.ndarray] | None = None
        self.num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            self._open(file)
        except BaseException as error:
            self.close()
            if isinstance(error, PickleError | OSError):
                raise self.refuse(shorten(error)) from None
            raise

    def read(self, tensor: Tensor) -> np.ndarray:
        storage, offset, strides = tensor.place
        dtype = as_dtype(tensor.dtype)
        if self._last is None or self._last[0] != storage:
            self._last = None
            data = self._read_storage(storage)
            self._num_read += len(data)
            self.check_unpacked(self._num_read)  # since tensors of several storages may alternate
            raw = np.frombuffer(data, f"{'>' if self.is_big_endian else '<'}u{dtype.itemsize}")
            self._last = storage, raw.astype(f"=u{dtype.itemsize}", copy=False).view(dtype)
        flat = self._last[1][offset:]
        strides = tuple(stride * dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    @abc.abstractmethod
    def _open(self, file: BinaryIO) -> None:
        """Read the content. Raises InputError or PickleError."""

    @abc.abstractmethod
    def _read_storage(self, storage: Storage) -> bytes:
        """Return the bytes of a storage. Raises InputError unless they are as many as it claims."""


class ZippedTorchFile(TorchFile):
    """A zip archive with one folder: data.pkl, byteorder and data/KEY."""

    def _open(self, file: BinaryIO) -> None:
        try:
            self._zip = self._opened.enter_context(zipfile.ZipFile(file))
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            cut = f"; its {self.num_bytes} bytes may be a download that was cut short: {AGAIN}"
            raise self.refuse(f"{shorten(error)}{cut}") from None
        names = self._zip.namelist()
        self.check_unpacked(sum(info.file_size for info in self._zip.infolist()))
        if len(set(names)) != len(names):
            raise self.refuse("it holds several members of one name")
        self._prefix = self._find_prefix(names)
        order = f"{self._prefix}byteorder"
        self.is_big_endian = order in names and self._read_member(order, 16).strip() == b"big"
        self.content, _ = load_pickle(io.BytesIO(self._read_member(f"{self._prefix}data.pkl", MAX_PICKLE_BYTES)))

    def _find_prefix(self, names: list[str]) -> str:
        """Return the archive's one folder."""
        found = [name for name in names if name.count("/") <= 1 and name.split("/")[-1] == "data.pkl"]
        if len(found) == 1:
            return found[0].removesuffix("data.pkl")
        packed = next((name for name in names if name.endswith(PACKED_WEIGHTS)), None)
        hint = f"; unpack it and give {packed!a}" if packed else ""
        raise self.refuse(f"it is a zip file without data.pkl{hint}")

    def _read_storage(self, storage: Storage) -> bytes:
        name, num_bytes = f"data/{storage.key}", storage.num_elements * STORAGES[storage.kind][1]
        data = self._read_member(f"{self._prefix}{name}", num_bytes)
        if len(data) != num_bytes:
            raise self.refuse(f"{name} has {len(data)} bytes, but its tensor needs {num_bytes}")
        return data

    def _read_member(self, name: str, max_bytes: int) -> bytes:
        try:
            info = self._zip.getinfo(name)
        except KeyError:
            raise self.refuse(f"{name!a} is missing") from None
        if info.file_size > max_bytes:
            raise self.refuse(f"{name} has {info.file_size} bytes, more than the {max_bytes} expected")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.refuse(f"{name} is neither stored nor deflated")
        try:
            return self._zip.read(info)
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise self.refuse(f"{name}: {shorten(error)}") from None


class LegacyTorchFile(TorchFile):
    """Pickles of magic number, version, system, object and keys of storages, then each storage's length and bytes."""

    def _open(self, file: BinaryIO) -> None:
        head = file.read(MAX_PICKLE_BYTES)
        pickles = io.BytesIO(head)
        if load_pickle(pickles)[0] != LEGACY_MAGIC:
            raise self.refuse(explain(head))
        for _ in range(2):
            load_pickle(pickles)
        self.content, storages = load_pickle(pickles)
        keys, _ = load_pickle(pickles)
        self._file, self._starts = file, {}
        self._find_storages(pickles.tell(), keys, storages)

    def _find_storages(self, start: int, keys: object, storages: list[Storage]) -> None:
        """Note where the bytes of each storage begin."""
        by_key = {storage.key: storage for storage in storages}
        is_list = isinstance(keys, list) and all(type(key) is str for key in keys)  # others may be slow to hash
        if not is_list or set(by_key) != set(keys) or len(keys) != len(by_key):
            raise PickleError("its list of storages does not fit its tensors")
        for key in keys:
            kind, num_elements = by_key[key].kind, by_key[key].num_elements
            if kind not in STORAGES:
                raise PickleError(f"it holds a {kind[:100]!a}, whose size is not known")
            self._starts[by_key[key]] = start + 8
            found = struct.unpack("<q", self._read_at(start, 8))[0]
            if found != num_elements:
                raise PickleError(f"storage {key[:100]!a} has {found} elements, not {num_elements}")
            start += 8 + num_elements * STORAGES[kind][1]
        if start > self.num_bytes:
            raise PickleError(f"it ends after {self.num_bytes} of {start} bytes; {AGAIN}")

    def _read_storage(self, storage: Storage) -> bytes:
        if storage not in self._starts:
            raise self.refuse(f"storage {storage.key[:100]!a} has several sizes or dtypes")
        return self._read_at(self._starts[storage], storage.num_elements * STORAGES[storage.kind][1])

    def _read_at(self, start: int, num_bytes: int) -> bytes:
        if start + num_bytes > self.num_bytes:
            raise self.refuse(f"it ends after {self.num_bytes} of at least {start + num_bytes} bytes; {AGAIN}")
        try:
            self._file.seek(start)
            data = self._file.read(num_bytes)
        except OSError as error:
            raise self.refuse(shorten(error)) from None
        if len(data) != num_bytes:
            raise self.refuse("it became shorter while it was read")
        return data
