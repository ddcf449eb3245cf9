"""Reads the zip files of torch.save with zipfile and a pickle reader that runs no pickled code; torch is not needed.

A tensor stays a small record until it is asked for, so a training checkpoint costs only the tensors used.
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mvar_jax.errors import InputError, shorten

DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
MAX_PICKLE_BYTES = 8 << 20
# More than this, and more than MAX_RATIO times the file, is no checkpoint but a zip bomb.
MAX_UNPACKED_BYTES = 4 << 30
MAX_RATIO = 100


class Storage(NamedTuple):
    """A zip member `data/KEY` and what it holds. `kind` is a key of DTYPES."""

    key: str
    kind: str
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.storage.kind]


class OrderedDict(dict):
    """Stands for collections.OrderedDict; `__setstate__` drops the `_metadata` that torch modules attach."""

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setstate__(self, state):
        pass


class RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2. No attributes, so that no pickle can change it."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
        is_size = lambda x: type(x) is int and x >= 0
        if not (
            isinstance(storage, Storage)
            and isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides)
            and all(map(is_size, (offset, *shape, *strides)))
        ):
            raise ValueError("a tensor without a storage, shape and strides")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        num_elements = math.prod(shape)
        if num_elements and (last >= storage.num_elements or num_elements > storage.num_elements):
            raise ValueError(f"a tensor of shape {shape} outside its storage of {storage.num_elements} elements")
        return Tensor(storage, offset, shape, strides)


class RebuildParameter:
    """Stands for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data, requires_grad=True, hooks=None) -> Tensor:
        if not isinstance(data, Tensor):
            raise ValueError("a parameter without a tensor")
        return data


class Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and Tensor records; any other class is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return RebuildParameter()
        raise ValueError(f"it asks for {f'{module}.{name}'!a}, which no weights need; nothing of it was run")

    def persistent_load(self, pid: Any) -> Storage:
        is_known = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
        if not is_known or type(pid[2]) is not str or type(pid[4]) is not int or pid[1] not in DTYPES:
            raise ValueError("a storage of an unknown form")
        return Storage(pid[2], pid[1], pid[4])


class TorchFile:
    """An open file of torch.save; `content` is what was saved, with Tensor records for tensors.

    field: the name of the option that gave the path, for messages. Raises InputError (also later, when reading
    a tensor) for a file that is unreadable, damaged, of torch's old format, or that holds other classes.
    """

    def __init__(self, field: str, path: str | os.PathLike):
        self.field, self.path = field, Path(path)
        self._read_storage: tuple[Storage, np.ndarray] | None = None
        try:
            with self.path.open("rb") as file:
                head = file.read(len(LEGACY_MAGIC))
            if head == LEGACY_MAGIC:
                raise self.refuse("torch's old format: torch.load it and torch.save it again with torch >= 1.6")
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise self.refuse(shorten(error)) from None
        try:
            self._check_size()
            self._prefix = self._find_prefix()
            order = f"{self._prefix}byteorder"
            self._is_big_endian = order in self._zip.namelist() and self._read_member(order, 16).strip() == b"big"
            self.content = self._unpickle(self._read_member(f"{self._prefix}data.pkl", MAX_PICKLE_BYTES))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self._zip.close()

    def refuse(self, reason: str) -> InputError:
        return InputError(self.field, str(self.path), f"weights as torch.save writes them ({reason})")

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor's values in their own dtype, in the machine's byte order; perhaps read-only."""
        storage, itemsize = tensor.storage, tensor.dtype.itemsize
        if self._read_storage is None or self._read_storage[0] != storage:
            self._read_storage = None
            num_bytes = storage.num_elements * itemsize
            data = self._read_member(f"{self._prefix}data/{storage.key}", num_bytes)
            if len(data) != num_bytes:
                raise self.refuse(f"data/{storage.key} holds {len(data)} bytes, its tensor needs {num_bytes}")
            raw = np.frombuffer(data, f"{'>' if self._is_big_endian else '<'}u{itemsize}")
            self._read_storage = storage, raw.astype(f"=u{itemsize}", copy=False).view(tensor.dtype)
        flat = self._read_storage[1][tensor.offset :]
        return np.lib.stride_tricks.as_strided(
            flat, tensor.shape, tuple(stride * itemsize for stride in tensor.strides), writeable=False
        )

    def _check_size(self) -> None:
        packed, unpacked = self.path.stat().st_size, sum(info.file_size for info in self._zip.infolist())
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * packed):
            raise self.refuse(f"{packed} bytes that would unpack to {unpacked}")

    def _find_prefix(self) -> str:
        """The archive's folder: torch puts everything in one."""
        found = [name for name in self._zip.namelist() if name.count("/") <= 1 and name.split("/")[-1] == "data.pkl"]
        if len(found) != 1:
            raise self.refuse("a zip file without its data.pkl")
        return found[0].removesuffix("data.pkl")

    def _read_member(self, name: str, max_bytes: int) -> bytes:
        try:
            info = self._zip.getinfo(name)
        except KeyError:
            raise self.refuse(f"{name!a} is missing") from None
        if info.file_size > max_bytes:
            raise self.refuse(f"{name} holds {info.file_size} bytes, more than the {max_bytes} expected")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.refuse(f"{name} is neither stored nor deflated")
        try:
            return self._zip.read(info)
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise self.refuse(f"{name}: {shorten(error)}") from None

    def _unpickle(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                # The reader's memo is a plain array: an absurd place in it would take all memory.
                if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
                    raise ValueError("a damaged pickle")
            return Unpickler(io.BytesIO(data)).load()
        except Exception as error:  # a damaged pickle raises whatever its opcodes run into
            raise self.refuse(shorten(error)) from None
