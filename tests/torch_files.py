"""Writes files as torch.save does, from stand-ins for torch's classes, so that tests need no torch."""

import collections
import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np

STORAGE_NAMES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Storage:
    """A flat array; `num_claimed` is the length that the pickle claims."""

    def __init__(self, data, num_claimed=None):
        self.data = np.asarray(data).reshape(-1)
        self.num_claimed = self.data.size if num_claimed is None else num_claimed


class View:
    """A tensor: a view of a storage, offset and strides in elements."""

    def __init__(self, storage, offset, shape, strides):
        self.parts = (storage, offset, shape, strides)


class Parameter:
    def __init__(self, data):
        self.data = data


class ModuleState(collections.OrderedDict):
    """A state dict with torch's `_metadata` attribute."""

    def __reduce__(self):
        return (
            collections.OrderedDict,
            (),
            {"_metadata": collections.OrderedDict({"": {"version": 1}})},
            None,
            iter(self.items()),
        )


def stand_in(module, name):
    found = type(name, (), {"__module__": module, "__call__": lambda self: None})
    found.__qualname__ = name
    return found


@contextlib.contextmanager
def torch_modules():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGE_NAMES.values():
        setattr(torch, name, stand_in("torch", name))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, stand_in("torch._utils", name))
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        yield torch, utils


class Pickler(pickle.Pickler):
    def __init__(self, file, torch, utils, is_legacy=False):
        super().__init__(file, protocol=2)
        self.tail = (None,) if is_legacy else ()
        self.torch, self.utils, self.storages = torch, utils, []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            self.storages.append(value)
        kind = getattr(self.torch, STORAGE_NAMES[value.data.dtype])
        return "storage", kind, str(self.storages.index(value)), "cuda:0", value.num_claimed, *self.tail

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            value = np.array(value, order="C")
            value = View(Storage(value), 0, value.shape, tuple(stride // value.itemsize for stride in value.strides))
        if isinstance(value, View):
            return self.utils._rebuild_tensor_v2, (*value.parts, False, collections.OrderedDict())
        if isinstance(value, Parameter):
            return self.utils._rebuild_parameter, (value.data, True, collections.OrderedDict())
        return NotImplemented


def save(path, content, compression=zipfile.ZIP_STORED, byteorder="little"):
    """As torch.save(content, path); arrays, Views and Parameters become tensors."""
    with torch_modules() as modules:
        file = io.BytesIO()
        pickler = Pickler(file, *modules)
        pickler.dump(content)
    save_members(path, file.getvalue(), [storage.data for storage in pickler.storages], compression, byteorder)


def save_legacy(path, content):
    """As torch.save(content, path, _use_new_zipfile_serialization=False)."""
    with torch_modules() as modules:
        file = io.BytesIO()
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, protocol=2)
        pickler = Pickler(file, *modules, is_legacy=True)
        pickler.dump(content)
        pickle.dump([str(i) for i in range(len(pickler.storages))], file, protocol=2)
    for storage in pickler.storages:
        file.write(struct.pack("<q", storage.data.size) + storage.data.tobytes())
    path.write_bytes(file.getvalue())


def save_members(path, pickled, storages=(), compression=zipfile.ZIP_STORED, byteorder="little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("name/data.pkl", pickled)
        archive.writestr("name/byteorder", byteorder)
        for i, data in enumerate(storages):
            raw = data.view(f"u{data.itemsize}").astype(f"{'<' if byteorder == 'little' else '>'}u{data.itemsize}")
            archive.writestr(f"name/data/{i}", raw.tobytes())
        archive.writestr("name/version", "3\n")
