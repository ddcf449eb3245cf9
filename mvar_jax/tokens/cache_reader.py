"""Reading a token cache: the token pyramids of a data set, as ArrayRecord shards and a `cache.json`.

A record is one image: its label (little-endian int32), then its token pyramids [views, L] row-major
(little-endian uint16; int32 if the codebook has more than 65,536 entries). `cache.json` is written last, so
a directory without it is not a cache. The folder `tokenizer` is the model directory of its tokenizer. See
cache_writer.py.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mvar_jax.data.protocols import TokenSource
from mvar_jax.data.shared_memory import SharedArray
from mvar_jax.errors import InputError
from mvar_jax.scales import areas_of
from mvar_jax.tokens.philox import first_draws_below

META_NAME = "cache.json"
TOKENIZER_FOLDER = "tokenizer"  # of the cache's own tokenizer, a model directory; older caches have none
FORMAT = 1
LABEL_BYTES = 4
_META_KEYS = {"tokenizer_fingerprint", "tokenizer_path", "sides", "vocab_size", "dtype", "label_names"}
_SPLIT_KEYS = {"num_records", "num_views", "shards"}
_SHARD_KEYS = {"name", "num_records", "bytes"}
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # with group size 1, for random access


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """Return the contents of a cache's `cache.json`.

    Raises:
      InputError: there is no finished cache at `path`, or its `cache.json` is unreadable.
    """
    reason = f"its {META_NAME} lacks keys or is not of format {FORMAT}"
    try:
        meta = json.loads((Path(path) / META_NAME).read_text())
        is_complete = meta["format"] == FORMAT and meta.keys() >= _META_KEYS
        for split in meta["splits"].values():
            is_complete &= split.keys() >= _SPLIT_KEYS
            is_complete &= all(shard.keys() >= _SHARD_KEYS for shard in split["shards"])
    except OSError:
        is_complete = False
        reason = f"it has no readable {META_NAME}; if cache_tokens was interrupted, run it again to finish the cache"
    except ValueError:
        is_complete, reason = False, f"its {META_NAME} is not valid JSON"
    except (TypeError, KeyError, AttributeError):
        is_complete = False
    if not is_complete:
        raise _refuse(path, "a finished token cache", reason)
    return meta


def _refuse(path: str | os.PathLike, expected: str, reason: str) -> InputError:
    return InputError(f"{path} must be {expected}: {reason}", field="cache", given=str(path), expected=expected)


class TokenCache(TokenSource):
    """One split of a token cache. `cache[i]` is `{"ids": int32 [views, L], "label": int}`.

    Args:
      path: directory of the cache.
      split: "train" or "val".
      expect_sides: sides of the tokenizer in use; None compares nothing.
      expect_vocab_size: its codebook's size; None compares nothing.
      max_memory_bytes: a split of up to this size is held in memory; a larger one is read from its files on access.

    Raises:
      InputError: the cache is unfinished, damaged or incomplete, has no such split, or was made by another
        tokenizer. Damage inside a split too large for memory raises only when the record is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        *,
        expect_sides: Iterable[int] | None = None,
        expect_vocab_size: int | None = None,
        max_memory_bytes: int = 256 * 2**20,
    ):
        self._dir = Path(path)
        self.meta = read_meta(path)
        self.sides = tuple(self.meta["sides"])
        self.vocab_size: int = self.meta["vocab_size"]
        self.label_names = tuple(self.meta["label_names"])
        self.tokenizer_path: str = self.meta["tokenizer_path"]
        other = "the tokenizer in use; encode the images again with cache_tokens"
        self._expect("sides", self.sides, None if expect_sides is None else tuple(expect_sides), other)
        self._expect("vocab_size", self.vocab_size, expect_vocab_size, other)
        if split not in self.meta["splits"]:
            allowed = f"one of {', '.join(self.meta['splits'])}"
            message = f"split must be {allowed}, the splits of {path}, got {split!r}"
            raise InputError(message, field="split", given=split, expected=allowed)
        entry = self.meta["splits"][split]
        self._dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._shape = (entry["num_views"], sum(areas_of(self.sides)))
        self._record_bytes = LABEL_BYTES + self._shape[0] * self._shape[1] * self._dtype.itemsize
        self._starts = np.cumsum([0, *(shard["num_records"] for shard in entry["shards"])])
        self._num_records = int(self._starts[-1])
        self._expect("num_records", entry["num_records"], self._num_records, "the sum over the shards")
        self._shards = entry["shards"]
        self._transform = entry.get("transform") or {}
        self._readers = [self._open_shard(shard) for shard in self._shards]
        self._memory: SharedArray | None = None
        if self._num_records * self._record_bytes <= max_memory_bytes:
            self._memory = SharedArray((self._num_records, self._record_bytes), np.uint8)
            for begin, end, reader in zip(self._starts, self._starts[1:], self._readers, strict=False):
                self._memory.array[begin:end] = self._as_bytes(self._read_shard(reader, None))

    def __getstate__(self):
        return {**self.__dict__, "_readers": None}  # of the C++ library: every process opens its own

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._readers = [self._open_shard(shard) for shard in self._shards]

    def _expect(self, field: str, given: Any, expected: Any, whose: str) -> None:
        if expected is not None and given != expected:
            message = f"token cache {self._dir} has {field} {given!r}, not {expected!r} like {whose}"
            raise InputError(message, field=field, given=given, expected=repr(expected))

    def _open_shard(self, shard: dict[str, Any]) -> ArrayRecordReader:
        name = shard["name"]
        path = self._dir / name
        if not path.is_file():
            raise _refuse(self._dir, "a complete token cache", f"{name} is missing")
        self._expect(f"bytes of {name}", path.stat().st_size, shard["bytes"], META_NAME)
        reader = ArrayRecordReader(str(path), _READ_OPTIONS)
        self._expect(f"records of {name}", reader.num_records(), shard["num_records"], META_NAME)
        return reader

    def _read_shard(self, reader: ArrayRecordReader, positions: list[int] | None) -> list[bytes]:
        """Return the records at these positions of a shard, or all of them for None."""
        try:
            records = reader.read_all() if positions is None else reader.read(positions)
        except RuntimeError as error:
            reason = f"a record is damaged ({str(error).split(';')[0]})"
            raise _refuse(self._dir, "an undamaged token cache", reason) from None
        for record in records:
            self._expect("bytes of a record", len(record), self._record_bytes, META_NAME)
        return records

    def _as_bytes(self, records: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(records), np.uint8).reshape(-1, self._record_bytes)

    def __len__(self) -> int:
        return self._num_records

    def name_of(self, index: int) -> str:
        """Return the record's number."""
        return f"record {index}"

    def identity(self) -> dict[str, Any]:
        """Return what tells this split from others: also the images and the tokenizer that it was made of."""
        # `path` is where the images lay
        transform = {name: value for name, value in self._transform.items() if name != "path"}
        made_of = {"transform": transform, "tokenizer": self.meta["tokenizer_fingerprint"]}
        return {**super().identity(), "num_views": self._shape[0], **made_of}

    def read(self, numbers_B: np.ndarray, seed: int, index_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Read a batch, one view of each record; see `TokenSource.read`."""
        ids_BvL, labels_B = self._read_views(numbers_B)
        return pick_views(ids_BvL, seed, index_B), labels_B

    def _read_views(self, numbers_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids [B, views, L] int32, labels [B] int32) of the records at these numbers."""
        if self._memory is not None:
            bytes_Br = self._memory.array[numbers_B]
        else:
            bytes_Br = np.empty((len(numbers_B), self._record_bytes), np.uint8)
            shard_B = np.searchsorted(self._starts, numbers_B, side="right") - 1
            for shard in np.unique(shard_B).tolist():
                rows = np.flatnonzero(shard_B == shard)
                positions = (numbers_B[rows] - self._starts[shard]).tolist()
                bytes_Br[rows] = self._as_bytes(self._read_shard(self._readers[shard], positions))
        labels_B = np.ascontiguousarray(bytes_Br[:, :LABEL_BYTES]).view("<i4")[:, 0]
        ids = np.ascontiguousarray(bytes_Br[:, LABEL_BYTES:]).view(self._dtype)
        return ids.reshape(-1, *self._shape).astype(np.int32), labels_B.astype(np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self._num_records)[index]  # negative and out-of-range indices as in a sequence
        ids, labels = self._read_views(np.array([index]))
        return {"ids": ids[0], "label": int(labels[0])}


def pick_views(ids_BvL: np.ndarray, seed: int, index_B: np.ndarray | None) -> np.ndarray:
    """Return one view of each image, [B, L]: drawn uniformly by (seed, index), or the first if there is no index.

    The draw is `Generator(Philox(key=[seed, index])).integers(views)`, like the flip of `PhotoTransform`.
    """
    if index_B is None:
        return ids_BvL[:, 0]
    return ids_BvL[np.arange(len(index_B)), first_draws_below(ids_BvL.shape[1], seed, index_B)]
