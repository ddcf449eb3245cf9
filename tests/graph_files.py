"""Writes frozen TensorFlow graphs, so that tests need no TensorFlow."""

import numpy as np


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def tensor(shape, *parts: bytes, dtype: int = 1) -> bytes:
    return number(1, dtype) + field(2, b"".join(field(2, number(1, n)) for n in shape)) + b"".join(parts)


def node(name: str, value: bytes, op: str = "Const", key: str = "value") -> bytes:
    attribute = field(1, key.encode()) + field(2, field(8, value))
    return field(1, field(1, name.encode()) + field(2, op.encode()) + field(5, attribute))


def constant(name: str, value: np.ndarray) -> bytes:
    """A float32 constant as TensorFlow writes it."""
    return node(name, tensor(value.shape, field(4, np.ascontiguousarray(value, "<f4").tobytes())))
