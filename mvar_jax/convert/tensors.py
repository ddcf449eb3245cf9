"""What a file of weights holds, as records: a tensor costs nothing until it is read."""

from typing import Any, NamedTuple

# storage class -> (dtype, bytes of an element); numpy has no dtype of the last ones, so their tensors are Foreign
STORAGES = {
    "torch.DoubleStorage": ("float64", 8),
    "torch.FloatStorage": ("float32", 4),
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
    "torch.ComplexFloatStorage": (None, 8),
    "torch.ComplexDoubleStorage": (None, 16),
    "torch.QInt8Storage": (None, 1),
    "torch.QUInt8Storage": (None, 1),
    "torch.QInt32Storage": (None, 4),
}


class Storage(NamedTuple):
    """A flat array of the file: its key, class (a name that STORAGES may know) and claimed length."""

    key: str
    kind: str
    num_elements: int


class View(NamedTuple):
    """The place of a tensor: offset and strides in elements of a storage."""

    storage: Storage
    offset: int
    strides: tuple[int, ...]


class Tensor(NamedTuple):
    """A tensor that has not been read. dtype: a name; place: what the file needs to find it."""

    shape: tuple[int, ...]
    dtype: str
    place: Any


class Foreign(dict):
    """A stand-in for an object of a class that is no part of weights: its class's name, items and attributes."""

    __slots__ = ("attributes", "class_name")
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __init__(self, class_name: str):
        super().__init__()
        self.class_name = class_name
        self.attributes: dict = {}
