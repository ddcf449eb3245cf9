"""Token pyramids of a data set, encoded once: ArrayRecord shards beside a `cache.json`; here they are read.

A record is one image: its label (little-endian int32), then its token pyramids [views, L] row-major
(little-endian uint16; int32 when the codebook has more than 65,536 entries). `cache.json` is written last, so
a directory without it is not a cache. See cache_writer.py.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mvar_jax.errors import InputError
from mvar_jax.scales import areas_of

META_NAME = "cache.json"
FORMAT = 1
LABEL_BYTES = 4
_META_KEYS = {"tokenizer_fingerprint", "tokenizer_path", "sides", "vocab_size", "dtype", "label_names"}
_SPLIT_KEYS = {"num_records", "num_views", "shards"}
_SHARD_KEYS = {"name", "num_records", "bytes"}
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # with group size 1, for random access


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a cache's `cache.json`.

    Raises:
      InputError: no finished cache at `path`, or its `cache.json` cannot be understood.
    """
    reason = f"its {META_NAME} lacks keys or is not of format {FORMAT}"
    try:
        meta = json.loads((Path(path) / META_NAME).read_text())
        is_complete = meta["format"] == FORMAT and meta.keys() >= _META_KEYS
        for split in meta["splits"].values():
            is_complete &= split.keys() >= _SPLIT_KEYS
            is_complete &= all(shard.keys() >= _SHARD_KEYS for shard in split["shards"])
    except OSError:
        is_complete, reason = False, f"there is no readable {META_NAME}, as after an interrupted writing"
    except ValueError:
        is_complete, reason = False, f"its {META_NAME} is not valid JSON"
    except (TypeError, KeyError, AttributeError):
        is_complete = False
    if not is_complete:
        raise InputError("cache", str(path), f"a finished token cache; {reason}")
    return meta


class TokenCache:
    """One split of a token cache as a source: `cache[i] -> {"ids": int32 [views, L], "label": int}`.

    A split of up to `max_memory_bytes` is held in memory; a larger one is read from its files on access.

    Args:
      expect_fingerprint, expect_sides, expect_vocab_size: what the tokenizer in use has; None: not compared.

    Raises:
      InputError: the cache is unfinished, damaged or incomplete, has no such split, or was made by another
        tokenizer. Damage inside a split too large for memory shows only when the record is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        *,
        expect_fingerprint: str | None = None,
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
        who = "as the tokenizer in use has; encode the images again with it"
        fingerprint = self.meta["tokenizer_fingerprint"]
        self._expect("tokenizer_fingerprint", fingerprint, expect_fingerprint, who)
        self._expect("sides", self.sides, None if expect_sides is None else tuple(expect_sides), who)
        self._expect("vocab_size", self.vocab_size, expect_vocab_size, who)
        if split not in self.meta["splits"]:
            raise InputError("split", split, f"one of {', '.join(self.meta['splits'])}, the splits of {path}")
        entry = self.meta["splits"][split]
        self._dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._shape = (entry["num_views"], sum(areas_of(self.sides)))
        self._record_bytes = LABEL_BYTES + self._shape[0] * self._shape[1] * self._dtype.itemsize
        self._starts = np.cumsum([0, *(shard["num_records"] for shard in entry["shards"])])
        self._num_records = int(self._starts[-1])
        self._expect("num_records", entry["num_records"], self._num_records, "the sum over the shards")
        self._shards = entry["shards"]
        self._readers = [self._open_shard(shard) for shard in self._shards]
        self._memory: np.ndarray | None = None
        if self._num_records * self._record_bytes <= max_memory_bytes:
            self._memory = np.concatenate([self._as_bytes(self._read(reader, None)) for reader in self._readers])

    def __getstate__(self):
        return {**self.__dict__, "_readers": None}  # of the C++ library: every process opens its own

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._readers = [self._open_shard(shard) for shard in self._shards]

    def _expect(self, field: str, given: Any, expected: Any, why: str) -> None:
        if expected is not None and given != expected:
            raise InputError(field, given, f"{expected!r}, {why} (token cache {self._dir})")

    def _open_shard(self, shard: dict[str, Any]) -> ArrayRecordReader:
        name, why = shard["name"], f"as {META_NAME} says"
        path = self._dir / name
        if not path.is_file():
            raise InputError("cache", str(self._dir), f"a complete token cache; {name} is missing")
        self._expect(f"bytes of {name}", path.stat().st_size, shard["bytes"], why)
        reader = ArrayRecordReader(str(path), _READ_OPTIONS)
        self._expect(f"records of {name}", reader.num_records(), shard["num_records"], why)
        return reader

    def _read(self, reader: ArrayRecordReader, positions: list[int] | None) -> list[bytes]:
        """The records at these positions of a shard; None reads all."""
        try:
            records = reader.read_all() if positions is None else reader.read(positions)
        except RuntimeError as error:
            reason = str(error).split(";")[0]
            raise InputError("cache", str(self._dir), f"undamaged records; {reason}") from None
        for record in records:
            self._expect("bytes of a record", len(record), self._record_bytes, f"as {META_NAME} says")
        return records

    def _as_bytes(self, records: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(records), np.uint8).reshape(-1, self._record_bytes)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    def __len__(self) -> int:
        return self._num_records

    def name_of(self, index: int) -> str:
        """Its number."""
        return f"record {index}"

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [B, views, L], labels int32 [B]) of the records at these numbers, each from 0 to len - 1."""
        if self._memory is not None:
            bytes_Br = self._memory[numbers]
        else:
            bytes_Br = np.empty((len(numbers), self._record_bytes), np.uint8)
            shard_B = np.searchsorted(self._starts, numbers, side="right") - 1
            for shard in np.unique(shard_B).tolist():
                rows = np.flatnonzero(shard_B == shard)
                positions = (numbers[rows] - self._starts[shard]).tolist()
                bytes_Br[rows] = self._as_bytes(self._read(self._readers[shard], positions))
        labels_B = np.ascontiguousarray(bytes_Br[:, :LABEL_BYTES]).view("<i4")[:, 0]
        ids = np.ascontiguousarray(bytes_Br[:, LABEL_BYTES:]).view(self._dtype)
        return ids.reshape(-1, *self._shape).astype(np.int32), labels_B.astype(np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self._num_records)[index]  # negative and out-of-range indices as in a sequence
        ids, labels = self.read(np.array([index]))
        return {"ids": ids[0], "label": int(labels[0])}
