"""A reader of torch.save's zip files that needs no torch and runs no pickled code.

A tensor is a small record until it is read, so a training checkpoint costs only the memory of the tensors used.
"""

import contextlib
import io
import math
import os
import pickle
import pickletools
import zipfile
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path

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
# a file that unpacks to more than this, and to more than MAX_RATIO times its size, is taken for a zip bomb
MAX_UNPACKED_BYTES = 4 << 30
MAX_RATIO = 100


class Storage(NamedTuple):
    """A zip member `data/KEY` and its content; `kind` is a key of DTYPES."""

    key: str
    kind: str
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage, with offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.storage.kind]


class OrderedDict(dict):
    """A substitute for collections.OrderedDict that drops the `_metadata` which torch modules attach."""

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setstate__(self, state):
        pass


class RebuildTensor:
    """A substitute for torch._utils._rebuild_tensor_v2, without attributes so that no pickle can change it."""

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
            raise ValueError("a tensor has no valid storage, shape or strides")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        num_elements = math.prod(shape)
        if num_elements and (last >= storage.num_elements or num_elements > storage.num_elements):
            raise ValueError(f"a tensor of shape {shape} exceeds its storage of {storage.num_elements} elements")
        return Tensor(storage, offset, shape, strides)


class RebuildParameter:
    """A substitute for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data, requires_grad=True, hooks=None) -> Tensor:
        if not isinstance(data, Tensor):
            raise ValueError("a parameter has no tensor")
        return data


class Unpickler(pickle.Unpickler):
    """An unpickler of dicts, lists, numbers, strings and Tensor records that refuses any other class by name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return RebuildParameter()
        raise ValueError(f"it refers to {f'{module}.{name}'!a}, which is not allowed in weights; no code was run")

    def persistent_load(self, pid: Any) -> Storage:
        is_known = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
        if not is_known or type(pid[2]) is not str or type(pid[4]) is not int or pid[1] not in DTYPES:
            raise ValueError("a storage has an unknown form")
        return Storage(pid[2], pid[1], pid[4])


class TorchFile:
    """An open file of torch.save.

    Opening it and reading a tensor raise InputError if the file is unreadable, damaged, in torch's old format, or
    contains other classes.

    Attributes:
      content: the saved object, with Tensor records for tensors.
      field: name of the option that gave the path, for messages.
    """

    def __init__(self, field: str, path: str | os.PathLike):
        self.field, self.path = field, as_path(path, field)
        self._read_storage: tuple[Storage, np.ndarray] | None = None
        self._opened = contextlib.ExitStack()
        try:
            file = self._opened.enter_context(self.path.open("rb"))
            if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
                raise self.refuse("it has torch's old format; load it and save it again with torch >= 1.6")
            self._zip = self._opened.enter_context(zipfile.ZipFile(file))
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            self.close()
            raise self.refuse(shorten(error)) from None
        except InputError:
            self.close()
            raise
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
        self._opened.close()

    def refuse(self, reason: str) -> InputError:
        """Return an InputError with the reason why the file cannot be read."""
        message = f"{self.field}={self.path} is not a readable file of torch.save: {reason}"
        return InputError(message, field=self.field, given=str(self.path), expected="a file of torch.save")

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's values in their own dtype and the machine's byte order; the array is read-only."""
        storage, itemsize = tensor.storage, tensor.dtype.itemsize
        if self._read_storage is None or self._read_storage[0] != storage:
            self._read_storage = None
            num_bytes = storage.num_elements * itemsize
            data = self._read_member(f"{self._prefix}data/{storage.key}", num_bytes)
            if len(data) != num_bytes:
                raise self.refuse(f"data/{storage.key} has {len(data)} bytes, but its tensor needs {num_bytes}")
            raw = np.frombuffer(data, f"{'>' if self._is_big_endian else '<'}u{itemsize}")
            self._read_storage = storage, raw.astype(f"=u{itemsize}", copy=False).view(tensor.dtype)
        flat = self._read_storage[1][tensor.offset :]
        return np.lib.stride_tricks.as_strided(
            flat, tensor.shape, tuple(stride * itemsize for stride in tensor.strides), writeable=False
        )

    def _check_size(self) -> None:
        packed, unpacked = self.path.stat().st_size, sum(info.file_size for info in self._zip.infolist())
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * packed):
            raise self.refuse(f"its {packed} bytes would unpack to {unpacked}")

    def _find_prefix(self) -> str:
        """Return the archive's one folder."""
        found = [name for name in self._zip.namelist() if name.count("/") <= 1 and name.split("/")[-1] == "data.pkl"]
        if len(found) != 1:
            raise self.refuse("it is a zip file without data.pkl")
        return found[0].removesuffix("data.pkl")

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

    def _unpickle(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                # the unpickler's memo is a plain array, so a huge index would allocate all memory
                if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
                    raise ValueError("its pickle is damaged")
            return Unpickler(io.BytesIO(data)).load()
        except Exception as error:  # a damaged pickle can raise any error
            raise self.refuse(shorten(error)) from None
