"""The constants of a frozen TensorFlow graph (.pb), read without TensorFlow; the graph is never built or run.

The file is a protocol buffer: fields of (number, wire type, value), some of which contain fields again. Four message
types are read, GraphDef.node, NodeDef.attr, AttrValue.tensor and TensorProto, and every length is checked against the
message around it before anything is taken.
"""

import math
import os
from collections.abc import Iterator

import numpy as np

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import as_path

MAX_GRAPH_BYTES = 512 << 20  # the Inception graph has 96 MB
MAX_FIELDS = 1_000_000
MAX_AXES = 8
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT32 = 1


class _Budget:
    """The number of fields that may still be read, so that a file of tiny fields ends."""

    def __init__(self):
        self.left = MAX_FIELDS

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")


def read_constants(field: str, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the float32 constants of a graph by node name; other nodes are skipped.

    Raises InputError if the file is missing, too large, or not a protocol buffer of a graph.
    """
    path = as_path(path, field)
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise ValueError(f"it has more than {MAX_GRAPH_BYTES} bytes")
        constants = _constants_of(memoryview(path.read_bytes()))
        if not constants:
            raise ValueError("it has no constants")
        return constants
    except (OSError, ValueError) as error:
        message = f"{field}={path} is not a readable TensorFlow graph: {shorten(error)}"
        raise InputError(message, field=field, given=str(path), expected="a frozen TensorFlow graph") from None


def _constants_of(data: memoryview) -> dict[str, np.ndarray]:
    constants, budget = {}, _Budget()
    for number, node in _fields(data, budget):
        if number == 1 and isinstance(node, memoryview):
            name, op, tensor = _read_node(node, budget)
            if op == b"Const" and tensor is not None:
                value = _read_tensor(tensor, budget)
                if value is not None:
                    constants[name.decode("utf-8", "replace")] = value
    return constants


def _read_node(node: memoryview, budget: _Budget) -> tuple[bytes, bytes, memoryview | None]:
    """Return (name, operation, the message of attribute `value`) of a NodeDef."""
    name, op, tensor = b"", b"", None
    for number, value in _fields(node, budget):
        if number == 1:
            name = _bytes(value).tobytes()
        elif number == 2:
            op = _bytes(value).tobytes()
        elif number == 5:
            entry = dict(_fields(_bytes(value), budget))  # a map's entry: 1 the key, 2 the value
            if 1 in entry and 2 in entry and _bytes(entry[1]).tobytes() == b"value":
                tensor = dict(_fields(_bytes(entry[2]), budget)).get(8)
    return name, op, None if tensor is None else _bytes(tensor)


def _read_tensor(tensor: memoryview, budget: _Budget) -> np.ndarray | None:
    """Return a TensorProto's values, None unless they are float32. Raises ValueError if they do not fit its shape."""
    dtype, shape, parts = 0, [], []
    for number, value in _fields(tensor, budget):
        if number == 1:
            dtype = value
        elif number == 2:
            shape = [_size(_bytes(axis), budget) for i, axis in _fields(_bytes(value), budget) if i == 2]
        elif number in (4, 5):  # tensor_content; float_val, packed or one by one
            parts.append(_bytes(value))
    if dtype != FLOAT32:
        return None
    data, num = b"".join(parts), math.prod(shape)
    if len(shape) > MAX_AXES or len(data) % 4 or not (len(data) == 4 * num or len(data) == 4):
        raise ValueError(f"a constant of shape {shape} has {len(data)} bytes")
    values = np.frombuffer(data, "<f4")
    return values.reshape(shape) if len(values) == num else np.broadcast_to(values[0], shape)


def _size(axis: memoryview, budget: _Budget) -> int:
    size = dict(_fields(axis, budget)).get(1, 0)
    if not isinstance(size, int) or size >= 1 << 31:
        raise ValueError("a constant has an axis of unknown size")
    return size


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number is where a message is expected")
    return value


def _fields(data: memoryview, budget: _Budget) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of each field: an integer, or a part of `data`. Raises ValueError if one exceeds it."""
    at = 0
    while at < len(data):
        budget.spend()
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"a field has the unknown wire type {wire}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes exceeds the {len(data) - at} that are left")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return (value, position after it). Raises ValueError if it has more than ten bytes or is cut."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number is cut")
