"""Arrays on disk or in an object store: zarr3 chunks through tensorstore, each with a CRC32C that every read checks.

An array is a grid of objects, one for each device's shard or part of it, and each object a grid of chunks. A process
writes the objects of its own shards and reads the chunks of its own shards, whatever the mesh was at the save.
The layout is in `zarr.json`, whose checksum is among its attributes.
"""

import contextlib
import itertools
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding

from mvar_jax.errors import shorten
from mvar_jax.files.paths import scheme_of

OBJECT_BYTES = 2**28  # tensorstore puts an object on S3 in one request, which S3 limits to 5 GB
CHUNK_BYTES = 2**22  # a reader with another mesh reads no more than this beyond its shard's border
_BYTES_UNDER_WAY = 2**30  # of host memory for copies that are being read or written
# A store that is gone for a minute does not end a run; tensorstore alone would try for 17 minutes.
_RETRIES = {"max_retries": 7, "initial_delay": "1s", "max_delay": "16s"}
_BYTES_CODEC = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM_CODEC = {"name": "crc32c"}
_LAYOUT_FILE = "zarr.json"
_LAYOUTS_AT_ONCE = 32
# tensorstore's codes for bytes that were read and are not what was written
_DAMAGE_CODES = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")

Index = tuple[slice, ...]


class Layout(NamedTuple):
    """An array's dtype and shape, and the shapes of its objects and of their chunks."""

    dtype: str
    shape: tuple[int, ...]
    object_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: Any, shape: Sequence[int], shard_shape: Sequence[int]) -> "Layout":
        """Return the layout of an array whose devices each hold shards of `shard_shape`."""
        dtype = np.dtype(dtype)
        object_shape = _shrink(shard_shape, OBJECT_BYTES // dtype.itemsize)
        chunk_shape = _shrink(object_shape, CHUNK_BYTES // dtype.itemsize)
        return cls(dtype.name, tuple(shape), object_shape, chunk_shape)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Layout":
        """Return the layout that zarr's metadata describe, if they are those of `metadata`."""
        object_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        first = metadata["codecs"][0]
        is_cut = first["name"] == "sharding_indexed"
        chunk_shape = first["configuration"]["chunk_shape"] if is_cut else object_shape
        return cls(metadata["data_type"], tuple(metadata["shape"]), tuple(object_shape), tuple(chunk_shape))

    @property
    def metadata(self) -> dict[str, Any]:
        """Return zarr's metadata of the array."""
        codecs: list[dict] = [_BYTES_CODEC, _CHECKSUM_CODEC]
        if self.chunk_shape != self.object_shape:
            chunks = {"chunk_shape": self.chunk_shape, "codecs": codecs, "index_codecs": codecs}
            codecs = [{"name": "sharding_indexed", "configuration": chunks | {"index_location": "end"}}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.object_shape}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": False if self.dtype == "bool" else 0,
            "codecs": codecs,
        }

    @property
    def object_bytes(self) -> int:
        """Return the size of an object without its checksums."""
        return math.prod(self.object_shape) * np.dtype(self.dtype).itemsize

    def objects_in(self, index: Index) -> list[Index]:
        """Return the part of each object inside a shard, as an index of the whole array."""
        if not math.prod(self.shape):
            return []
        ranges = [range(part.start, part.stop, size) for part, size in zip(index, self.object_shape, strict=True)]
        return [
            tuple(slice(start, start + size) for start, size in zip(starts, self.object_shape, strict=True))
            for starts in itertools.product(*ranges)
        ]


class Piece(NamedTuple):
    """An object to write: the array's name and layout, the object's place in the array, its values."""

    name: str
    layout: Layout
    place: Index
    values: np.ndarray


class ReadError(Exception):
    """An array that could not be read.

    is_damage: whether that is because of what is stored; else the storage could not be reached.
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name, self.is_damage = name, message.startswith(_DAMAGE_CODES)


def whole_index(shape: Sequence[int]) -> Index:
    """Return the index of a whole array."""
    return tuple(slice(0, size) for size in shape)


def plain_index(index: Index | None, shape: Sequence[int]) -> Index:
    """Return an index of JAX, which may be or hold None, as starts and stops."""
    if index is None:
        return whole_index(shape)
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def write(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write objects into a folder and wait for all. If one fails, wait for the others, then raise its error."""
    context = _context()
    stores: dict[str, ts.TensorStore] = {}
    under_way: deque = deque()

    def start(piece: Piece):
        if piece.name not in stores:
            stores[piece.name] = _open(folder, piece.name, piece.layout, context)
        target = stores[piece.name][piece.place]
        under_way.append(target.write(piece.values, can_reference_source_data_indefinitely=True))
        return under_way[-1]

    try:
        for _, future in _overlap(pieces, start, lambda piece: piece.values.nbytes):
            future.result()
            under_way.popleft()
    finally:
        for future in under_way:  # of a failed write, whose folder is removed next
            with contextlib.suppress(Exception):
                future.result()


def write_layouts(folder: Path, layouts: Mapping[str, Layout]) -> None:
    """Write the layouts of arrays: one process does."""

    def write_one(name: str) -> None:
        path = folder / name / _LAYOUT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encode(layouts[name]))

    with ThreadPoolExecutor(_LAYOUTS_AT_ONCE) as threads:
        list(threads.map(write_one, layouts))


def read_layouts(folder: Path, names: Sequence[str]) -> list[Layout]:
    """Return the layouts of arrays. Raises ReadError."""

    def read_one(name: str) -> Layout:
        try:
            data = (folder / name / _LAYOUT_FILE).read_bytes()
        except FileNotFoundError:
            raise ReadError(name, f"NOT_FOUND: {_LAYOUT_FILE} is missing") from None
        except OSError as error:
            raise ReadError(name, shorten(error)) from error
        try:
            layout = Layout.from_metadata(json.loads(data))
        except (ValueError, LookupError, TypeError):
            layout = None
        if layout is None or _encode(layout) != data:
            raise ReadError(name, f"DATA_LOSS: {_LAYOUT_FILE} is not what was written")
        return layout

    with ThreadPoolExecutor(_LAYOUTS_AT_ONCE) as threads:
        return list(threads.map(read_one, names))


def read(folder: Path, named: Sequence[tuple[str, Sharding]]) -> list[jax.Array]:
    """Read this process's shards of arrays. Raises ReadError."""
    context = _context()
    layouts = read_layouts(folder, [name for name, _ in named])
    arrays = [(name, layout, sharding) for (name, sharding), layout in zip(named, layouts, strict=True)]

    def start(array: tuple[str, Layout, Sharding]):
        name, layout, sharding = array
        store = _open(folder, name, layout, context)
        index_of = sharding.addressable_devices_indices_map(layout.shape)
        plain = {device: plain_index(index, layout.shape) for device, index in index_of.items()}
        distinct = {_starts(index): index for index in plain.values()}
        futures = {starts: store[index].read() for starts, index in distinct.items()}
        return {device: futures[_starts(index)] for device, index in plain.items()}

    def finish(array: tuple[str, Layout, Sharding], future_of: dict) -> jax.Array:
        name, layout, sharding = array
        try:
            shards = [jax.device_put(future.result(), device) for device, future in future_of.items()]
        except ValueError as error:
            raise ReadError(name, str(error)) from error
        return jax.make_array_from_single_device_arrays(layout.shape, sharding, shards)

    def shard_bytes(array: tuple[str, Layout, Sharding]) -> int:
        _, layout, sharding = array
        shards = math.prod(sharding.shard_shape(layout.shape)) * np.dtype(layout.dtype).itemsize
        return shards * len(sharding.addressable_devices)

    return [finish(array, futures) for array, futures in _overlap(arrays, start, shard_bytes)]


def _encode(layout: Layout) -> bytes:
    text = json.dumps(layout.metadata)
    return json.dumps(layout.metadata | {"attributes": {"crc32": zlib.crc32(text.encode())}}).encode()


def _starts(index: Index) -> tuple[int, ...]:
    return tuple(part.start for part in index)


def _overlap(jobs: Iterable, start: Callable, num_bytes: Callable) -> Iterable[tuple[Any, Any]]:
    """Yield each job with what `start` returned for it, while the next ones are already started."""
    started: deque = deque()
    under_way = 0
    for job in jobs:
        started.append((job, start(job)))
        under_way += num_bytes(job)
        while under_way > _BYTES_UNDER_WAY and len(started) > 1:
            oldest = started.popleft()
            yield oldest
            under_way -= num_bytes(oldest[0])
    while started:
        yield started.popleft()


def _shrink(shape: Sequence[int], max_size: int) -> tuple[int, ...]:
    """Divide dimensions, the first ones first, until at most `max_size` elements are left."""
    sizes = [max(1, size) for size in shape]
    for axis in range(len(sizes)):
        while math.prod(sizes) > max_size and sizes[axis] > 1:
            sizes[axis] //= next(n for n in range(2, sizes[axis] + 1) if sizes[axis] % n == 0)
    return tuple(sizes)


def _context() -> ts.Context:
    return ts.Context({"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES})


def _open(folder: Path, name: str, layout: Layout, context: ts.Context) -> ts.TensorStore:
    """Open an array by its layout alone: nothing is read."""
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(folder / name),
        "metadata": layout.metadata,
        "open": True,
        "assume_metadata": True,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(ts.Spec(spec), context=context).result()


def _kvstore(path: Path) -> dict:
    scheme = scheme_of(path)
    if scheme is None:
        # An object has one writer, and a folder counts only once it is complete: no lock, which some cluster file
        # systems lack, and no rename of each file.
        return {"driver": "file", "path": f"{path}/", "file_io_locking": {"mode": "non_atomic"}}
    bucket, _, key = str(path).partition("://")[2].partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    store: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{key}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:  # tensorstore does not read it, and then needs the region's name
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        store |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # or it complains of missing files before it looks there
        store |= {"aws_credentials": {"type": "environment"}}
    return store
