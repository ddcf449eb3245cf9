"""Shards of a token cache: ArrayRecord files on this machine, or in an object store.

Records have one size and, in caches written by this version, are not compressed. A record's place in its file then
follows from the format (riegeli), and one record is read from a store by one request for its bytes.
"""

import contextlib
import errno
import functools
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mvar_jax.errors import InputError, find_storage_error, shorten
from mvar_jax.files.limits import allow_open_files
from mvar_jax.files.paths import is_store
from mvar_jax.files.stores import StorePath
from mvar_jax.tokens.copies import Copies
from mvar_jax.tokens.requests import requests

WRITE_OPTIONS = "group_size:1,uncompressed"
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # with group size 1, for random access
# A file is a sequence of chunks, here of one record each, after a first chunk that marks the format. Every block of
# 64 KiB begins with a header, which may lie inside a chunk.
_BLOCK, _BLOCK_HEADER = 2**16, 24
_FIRST_CHUNK = 64
_CHUNK_HEADER = struct.Struct(
    "<8xQ8xQQ"
)  # hash, bytes of data, hash of data, kind and number of records, bytes decoded
_KIND = ord("r") | 1 << 8  # records, one

Finish = Callable[[], np.ndarray]


def refuse(cache: str | os.PathLike, expected: str, reason: str) -> InputError:
    """Return the error of a cache that is not as `expected`."""
    return InputError(f"{cache} must be {expected}: {reason}", field="cache", given=str(cache), expected=expected)


def check_equal(cache: str | os.PathLike, field: str, given: Any, expected: Any, whose: str) -> None:
    """Raise InputError if a property of the cache is not the expected one."""
    if given != expected:
        message = f"token cache {cache} has {field} {given!r}, not {expected!r} like {whose}"
        raise InputError(message, field=field, given=given, expected=repr(expected))


@contextlib.contextmanager
def writing_shard(file: Path, path: Path) -> Iterator[Callable[[bytes], None]]:
    """Open a new file of this machine and yield a function that writes a record.

    What the library raises is raised as OSError of `path`, the shard's place.
    """

    def call(method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except RuntimeError as error:
            raise find_storage_error(error, path) or OSError(errno.EIO, shorten(error), str(path)) from error

    writer = call(ArrayRecordWriter, str(file), WRITE_OPTIONS)
    try:
        yield functools.partial(call, writer.write)
    finally:
        call(writer.close)


@contextlib.contextmanager
def on_this_machine(path: Path) -> Iterator[Path]:
    """Yield a file of this machine: the path itself, or a copy of an object, which is removed in the end."""
    if not is_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mvar_") as folder:
        copy = Path(folder) / path.name
        path.download(copy)  # type: ignore[attr-defined]
        yield copy


class LocalShard:
    """A shard in a file of this machine.

    Args:
      path: of the file.
      entry: name, num_records and bytes of the shard, as in `cache.json`.
      record_bytes: size of a record.
      cache: the cache's path, for errors.

    Raises:
      InputError: the file is missing or has another size or number of records.
    """

    def __init__(self, path: Path, entry: dict[str, Any], record_bytes: int, cache: str | os.PathLike):
        self._path, self._entry, self._record_bytes, self._cache = path, entry, record_bytes, cache
        self._reader: ArrayRecordReader | None = self._open()

    def __getstate__(self):
        return {**self.__dict__, "_reader": None}  # of the C++ library: every process opens its own

    def _open(self) -> ArrayRecordReader:
        name = self._entry["name"]
        if not self._path.is_file():
            raise refuse(self._cache, "a complete token cache", f"{name} is missing")
        self._expect(f"bytes of {name}", self._path.stat().st_size, self._entry["bytes"])
        reader = ArrayRecordReader(str(self._path), _READ_OPTIONS)
        self._expect(f"records of {name}", reader.num_records(), self._entry["num_records"])
        return reader

    def _expect(self, field: str, given: Any, expected: Any) -> None:
        check_equal(self._cache, field, given, expected, "cache.json")

    def read_all(self) -> np.ndarray:
        """Return all records, [num_records, record_bytes] uint8, and close the file until the next call.

        Raises InputError if one is damaged.
        """
        records = self._read(None)
        self._reader = None
        return records

    def start(self, positions: list[int]) -> Finish:
        """Return a function that returns the records at these positions, [positions, record_bytes] uint8."""
        return functools.partial(self._read, positions)

    def _read(self, positions: list[int] | None) -> np.ndarray:
        if self._reader is None:  # if two threads open it at once, one reader is dropped
            self._reader = self._open()
        reader = self._reader
        try:
            records = reader.read_all() if positions is None else reader.read(positions)
        except RuntimeError as error:
            reason = f"a record is damaged ({str(error).split(';')[0]})"
            raise refuse(self._cache, "an undamaged token cache", reason) from None
        for record in records:
            self._expect("bytes of a record", len(record), self._record_bytes)
        return np.frombuffer(b"".join(records), np.uint8).reshape(-1, self._record_bytes)


class StoreShard:
    """A shard in an object store: read from a whole copy on this machine if there is one, else record by record.

    Args:
      path: of the object.
      entry, record_bytes, cache: see `LocalShard`.
      copies: copies of the cache's shards on this machine.
      has_ranges: whether the records are not compressed, so that one can be read alone.
    """

    def __init__(
        self,
        path: StorePath,
        entry: dict[str, Any],
        record_bytes: int,
        cache: str | os.PathLike,
        copies: Copies,
        has_ranges: bool,
    ):
        self.path, self.entry, self._record_bytes, self._cache = path, entry, record_bytes, cache
        self._copies, self._has_ranges = copies, has_ranges
        self._local: LocalShard | None = None

    def __getstate__(self):
        state = {**self.__dict__, "_local": None}  # another process may find no copy
        state.pop("_begins", None)
        return state

    def _open_local(self, path: Path) -> LocalShard:
        return LocalShard(path, self.entry, self._record_bytes, path.parent)  # an error names the copy

    def read_all(self) -> np.ndarray:
        """Return all records, [num_records, record_bytes] uint8. Raises InputError if one is damaged."""
        if path := self._copies.fetch(self):
            return self._open_local(path).read_all()
        with on_this_machine(self.path) as path:
            return self._open_local(path).read_all()

    def start(self, positions: list[int]) -> Finish:
        """Begin to read the records at these positions; return a function that waits for them."""
        if self._local is None:
            path = self._copies.find(self)
            if path is None and not self._has_ranges:
                path = self._copies.fetch(self)
            if path is not None:
                self._local = self._open_local(path)
        if self._local is not None:
            return self._local.start(positions)
        records = [requests().submit(self._read_record, position) for position in positions]
        return lambda: np.stack([np.frombuffer(record.result(), np.uint8) for record in records])

    @functools.cached_property
    def _begins(self) -> list[int]:
        return chunk_begins(self.entry["num_records"], self._record_bytes)

    def _read_record(self, position: int) -> bytes:
        begin, end = self._begins[position], self._begins[position + 1]
        return self._unpack(begin, self.path.read_range(begin, end - begin))

    def _unpack(self, begin: int, data: bytes) -> bytes:
        """Return the record of the chunk whose bytes from `begin` on are `data`."""
        parts, position = [], 0
        while position < len(data):
            in_block = (begin + position) % _BLOCK
            stop = position + _BLOCK - in_block
            parts.append(data[position + (0 if in_block else _BLOCK_HEADER) : stop])
            position = stop
        chunk = b"".join(parts)
        expected = _data_bytes(self._record_bytes), _KIND, self._record_bytes
        if len(chunk) < _CHUNK_HEADER.size or _CHUNK_HEADER.unpack_from(chunk) != expected:
            name = self.entry["name"]
            reason = f"byte {begin} of {name} does not begin a record of {self._record_bytes} bytes"
            raise refuse(self._cache, "an undamaged token cache", reason)
        return chunk[-self._record_bytes :]


def open_shards(
    cache: Path, split: dict[str, Any], record_bytes: int, copies: Copies | None
) -> list[LocalShard] | list[StoreShard]:
    """Return the shards of a split of a cache, which lies in a store if there are `copies`.

    split: its entry in `cache.json`. Raises InputError if the cache is incomplete, or if its records are compressed
    and the copies may not hold all shards.
    """
    entries = split["shards"]
    if copies is None:
        allow_open_files(len(entries), f"{len(entries)} shards of {cache}")
        return [LocalShard(cache / entry["name"], entry, record_bytes, cache) for entry in entries]
    has_ranges = split.get("compressed", True) is False
    if not has_ranges and copies.missing_bytes:
        least = -(-(copies.limit_bytes + copies.missing_bytes) // 2**20)
        given = copies.limit_bytes // 2**20
        words = f"config.data.cache_disk_mib must be {least} or more for {cache}, got {given}"
        raise InputError(
            f"{words}: older versions compressed the records, so each shard is read as a whole",
            field="config.data.cache_disk_mib",
            given=given,
            expected=f"{least} or more",
        )
    there = {path.name for path in cache.iterdir()}
    for entry in entries:
        if entry["name"] not in there:
            raise refuse(cache, "a complete token cache", f"{entry['name']} is missing")
    return [StoreShard(cache / entry["name"], entry, record_bytes, cache, copies, has_ranges) for entry in entries]


def _data_bytes(record_bytes: int) -> int:
    """Return the bytes of a chunk's data: a mark of no compression, the sizes' own size, the size, the record."""
    return 2 + -(-record_bytes.bit_length() // 7) + record_bytes


def chunk_begins(num_records: int, record_bytes: int) -> list[int]:
    """Return the place of each record's chunk in a shard, and where the last one ends."""
    num_bytes, usable = _CHUNK_HEADER.size + _data_bytes(record_bytes), _BLOCK - _BLOCK_HEADER
    begins = [_FIRST_CHUNK]
    for _ in range(num_records):
        begin = begins[-1]
        num_headers = (num_bytes + (begin + usable - 1) % _BLOCK) // usable
        begins.append(begin + num_bytes + num_headers * _BLOCK_HEADER)
    return begins
