"""Reading a token cache: the token pyramids of a data set, as ArrayRecord shards and a `cache.json`.

A record is one image: its label (little-endian int32), then its token pyramids [views, L] row-major
(little-endian uint16; int32 if the codebook has more than 65,536 entries). `cache.json` is written last, so
a directory without it is not a cache. The folder `tokenizer` is the model directory of its tokenizer. See
cache_writer.py.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from mvar_jax.checkpoints.model_directory import MODEL_FILE, fingerprint, ids_fingerprint, load_model
from mvar_jax.data.protocols import TokenSource, digest
from mvar_jax.data.shared_memory import SharedArray
from mvar_jax.errors import InputError, RunError, shorten
from mvar_jax.files.json_files import read_json
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.models.networks import Networks
from mvar_jax.scales import areas_of
from mvar_jax.tokens.copies import Copies, default_folder
from mvar_jax.tokens.philox import first_draws_below
from mvar_jax.tokens.shards import check_equal, open_shards, refuse

META_NAME = "cache.json"
TOKENIZER_FOLDER = "tokenizer"  # of the cache's own tokenizer, a model directory; older caches have none
FORMAT = 1
LABEL_BYTES = 4


class Shard(TypedDict):
    """A file of a split."""

    name: str
    num_records: int
    bytes: int
    files: NotRequired[str]  # a digest of the images that it was made of; older caches have none


class Split(TypedDict):
    """A split in `cache.json`."""

    num_records: int
    num_views: int
    shards: list[Shard]


class Meta(TypedDict):
    """What a reader needs of `cache.json`."""

    format: Literal[1]
    tokenizer_fingerprint: str
    tokenizer_ids: NotRequired[str]  # `ids_fingerprint` of the tokenizer; older caches have none
    tokenizer_path: str
    tokenizer: NotRequired[str | None]
    sides: list[int]
    vocab_size: int
    dtype: Literal["uint16", "int32"]
    label_names: list[str]
    splits: dict[str, Split]


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """Return the contents of a cache's `cache.json`.

    Raises:
      InputError: there is no finished cache at `path`, or its `cache.json` is unreadable.
    """
    try:
        return read_json(as_path(path, "cache") / META_NAME, Meta)
    except FileNotFoundError:
        reason = f"it has no readable {META_NAME}; if cache_tokens was interrupted, run it again to finish the cache"
    except OSError as error:
        reason = f"its {META_NAME} cannot be read: {shorten(error)}"
    except ValueError as error:
        reason = f"its {META_NAME} is damaged: {shorten(error)}"
    raise refuse(path, "a finished token cache", reason)


def find_missing(path: str | os.PathLike) -> str:
    """Return the name of a file that a finished cache lacks or that was cut, "" if it has all of them."""
    folder, meta = as_path(path, "cache"), read_meta(path)
    for split in meta["splits"].values():
        for shard in split["shards"]:
            file = folder / shard["name"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                return shard["name"]
    description = f"{meta['tokenizer']}/{MODEL_FILE}" if meta.get("tokenizer") else ""
    return "" if not description or (folder / description).is_file() else description


def has_ids_of(path: str | os.PathLike, networks: Networks) -> bool:
    """Return whether a tokenizer gives the ids of a finished cache: the one that made it, with whatever decoder."""
    meta, ids = read_meta(path), ids_fingerprint(networks.tokenizer, networks.tokenizer_params)
    if "tokenizer_ids" in meta:
        return meta["tokenizer_ids"] == ids
    made_by = meta["tokenizer_fingerprint"]
    if fingerprint(networks.tokenizer, networks.tokenizer_params) == made_by:
        return True
    if not meta.get("tokenizer"):
        return False
    # an older cache noted no fingerprint of ids: compute it from the cache's own copy of the tokenizer
    modules, params = load_model(as_path(path, "cache") / meta["tokenizer"])
    own = modules["tokenizer"], params["tokenizer"]
    return fingerprint(*own) == made_by and ids_fingerprint(*own) == ids


def describe_tokenizer(meta: dict[str, Any], networks: Networks) -> str:
    """Return "OURS, not THEIRS": how a tokenizer's fingerprint differs from that of a cache's tokenizer."""
    digest = ids_fingerprint if "tokenizer_ids" in meta else fingerprint
    there = meta.get("tokenizer_ids", meta["tokenizer_fingerprint"])
    return f"{digest(networks.tokenizer, networks.tokenizer_params)}, not {there}"


class TokenCache(TokenSource):
    """One split of a token cache. `cache[i]` is `{"ids": int32 [views, L], "label": int}`.

    Args:
      path: directory of the cache, on this machine or in an object store.
      split: "train" or "val".
      expect_sides: sides of the tokenizer in use; None compares nothing.
      expect_vocab_size: its codebook's size; None compares nothing.
      max_memory_bytes: a split of up to this size is held in memory; a larger one is read from its files on access.
      disk_folder: where shards of a store are copied to; None for a folder of this user in the temporary folder.
      max_disk_bytes: size of these copies. Records of further shards are read from the store one by one.

    Raises:
      InputError: the cache is unfinished, damaged or incomplete, has no such split, or was made by another
        tokenizer. Damage inside a split too large for memory raises only when the record is read.
      RunError: the store does not answer.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        *,
        expect_sides: Iterable[int] | None = None,
        expect_vocab_size: int | None = None,
        max_memory_bytes: int = 256 * 2**20,
        disk_folder: str | os.PathLike | None = None,
        max_disk_bytes: int = 8192 * 2**20,
    ):
        self._dir = as_path(path, "cache")
        self.meta = read_meta(self._dir)
        self.sides = tuple(self.meta["sides"])
        self.vocab_size: int = self.meta["vocab_size"]
        self.label_names = tuple(self.meta["label_names"])
        self.tokenizer_path: str = self.meta["tokenizer_path"]
        other = "the tokenizer in use; encode the images again with cache_tokens"
        if expect_sides is not None:
            check_equal(path, "sides", self.sides, tuple(expect_sides), other)
        if expect_vocab_size is not None:
            check_equal(path, "vocab_size", self.vocab_size, expect_vocab_size, other)
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
        check_equal(path, "num_records", entry["num_records"], self._num_records, "the sum over the shards")
        self._copies: Copies | None = None
        self._transform = entry.get("transform") or {}
        self._files = [shard.get("files", "") for shard in entry["shards"]]
        self._memory: SharedArray | None = None
        with self._naming_the_store():
            if is_store(self._dir):
                self._copies = Copies(disk_folder or default_folder(), self._dir, self.meta, max_disk_bytes)
            self._shards = open_shards(self._dir, entry, self._record_bytes, self._copies)
            if self._num_records * self._record_bytes <= max_memory_bytes:
                self._memory = self._read_all()

    @contextlib.contextmanager
    def _naming_the_store(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"token cache {self._dir} cannot be read: {shorten(error)}") from error

    def _read_all(self) -> SharedArray:
        memory = SharedArray((self._num_records, self._record_bytes), np.uint8)

        def fill(shard: int) -> None:
            memory.array[self._starts[shard] : self._starts[shard + 1]] = self._shards[shard].read_all()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(fill, range(len(self._shards))))
        return memory

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
        if "tokenizer_ids" in self.meta:
            made_of["tokenizer_ids"] = self.meta["tokenizer_ids"]
        if all(self._files):
            # by the number of shards, since digests of other parts of the images cannot be compared
            made_of["files_of_shards"] = {str(len(self._files)): digest(self._files)}
        return {**super().identity(), "num_views": self._shape[0], **made_of}

    def read(self, numbers_B: np.ndarray, seed: int, index_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Read a batch, one view of each record; see `TokenSource.read`."""
        with self._naming_the_store():
            ids_BvL, labels_B = self._read_views(numbers_B)
        return pick_views(ids_BvL, seed, index_B), labels_B

    def _read_views(self, numbers_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids [B, views, L] int32, labels [B] int32) of the records at these numbers."""
        if self._memory is not None:
            bytes_Br = self._memory.array[numbers_B]
        else:
            if self._copies is not None:
                self._copies.fetch_in_background(self._shards)
            bytes_Br = np.empty((len(numbers_B), self._record_bytes), np.uint8)
            shard_B = np.searchsorted(self._starts, numbers_B, side="right") - 1
            started = []
            for shard in np.unique(shard_B).tolist():
                rows = np.flatnonzero(shard_B == shard)
                positions = (numbers_B[rows] - self._starts[shard]).tolist()
                started.append((rows, self._shards[shard].start(positions)))
            for rows, finish in started:  # a store answers all of them at once
                bytes_Br[rows] = finish()
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
