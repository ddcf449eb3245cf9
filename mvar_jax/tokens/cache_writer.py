"""Writes a token cache shard by shard. Killed and started again it goes on, and leaves the same files."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mvar_jax.errors import InputError
from mvar_jax.scales import areas_of
from mvar_jax.tokens.cache_reader import FORMAT, META_NAME, read_meta

UNFINISHED = "unfinished"  # the folder, inside the cache's, in which shards wait for the last one
_IDENTITY_NAME = "identity.json"
_WRITE_OPTIONS = "group_size:1"

Record = tuple[np.ndarray, int]
# (begin, end, skipped) -> the records of images begin to end; what is bad is appended to `skipped` instead
ReadRecords = Callable[[int, int, list[dict[str, Any]]], Iterable[Record]]


class CacheWriter:
    """Writes a token cache split by split; the cache appears when the `with` block ends without an exception.

    Until then everything lies in the folder `unfinished` of `out_dir`: whole shards, which the next writer of the
    same cache keeps, and which another's removes. A cache that was there before stays as it was until a complete
    one takes its place. Several processes share the work: shard i belongs to process `i % process_count`, and
    process 0 puts the cache together once `wait()` says that all are done.

        with CacheWriter(out_dir, ...) as writer:
            writer.write_split("train", read_records, num_images=1437, num_views=2, transform={...})
            writer.write_split("val", ...)
    """

    def __init__(
        self,
        out_dir: str | os.PathLike,
        *,
        sides: Iterable[int],
        vocab_size: int,
        tokenizer_fingerprint: str,
        tokenizer_path: str,
        label_names: Iterable[str],
        process_index: int = 0,
        process_count: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        self._dir = Path(out_dir)
        self._unfinished = self._dir / UNFINISHED
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "tokenizer_path": str(tokenizer_path),
            "sides": [int(side) for side in sides],
            "vocab_size": vocab_size,
            "dtype": self._dtype.name,
            "label_names": list(label_names),
            "splits": {},
        }
        self._num_tokens = sum(areas_of(self._meta["sides"]))
        self._process_index, self._process_count, self._wait = process_index, process_count, wait

    def __enter__(self) -> "CacheWriter":
        self._unfinished.mkdir(parents=True, exist_ok=True)
        return self

    def write_split(
        self,
        split: str,
        read_records: ReadRecords,
        *,
        num_images: int,
        num_views: int,
        transform: dict[str, Any],
        num_shards: int = 1,
    ) -> None:
        """Write this process's shards of one split; those that are there already are kept.

        Args:
          read_records: (integer ids [num_views, L], label) of every good image of a range, in order.
          transform: what was done to the images before encoding; kept for the reader, not interpreted.
          num_shards: files over which the images are spread in order.

        Raises:
          InputError: ids or labels out of range, ids of another shape or not integers, or another number of
            records than images that are not skipped. The shards finished before stay.
        """
        if not 1 <= num_shards <= num_images:
            raise InputError("num_shards", num_shards, f"from 1 to the number of images, {num_images}")
        bounds = [shard * num_images // num_shards for shard in range(num_shards + 1)]
        names = [f"{split}-{shard:05d}-of-{num_shards:05d}.array_record" for shard in range(num_shards)]
        plan = {"num_images": num_images, "num_views": num_views, "transform": transform, "names": names}
        self._meta["splits"][split] = plan
        self._forget_other_work(split)
        for shard in range(self._process_index, num_shards, self._process_count):
            if self._finished(names[shard]) is None:
                self._write_shard(names[shard], read_records, bounds[shard], bounds[shard + 1], num_views)

    def _write_shard(self, name: str, read_records: ReadRecords, begin: int, end: int, num_views: int) -> None:
        path, skipped, num_records = self._unfinished / name, [], 0
        temporary = path.with_name(name + ".tmp")
        try:
            with contextlib.closing(ArrayRecordWriter(str(temporary), _WRITE_OPTIONS)) as writer:
                for ids, label in self._checked(read_records(begin, end, skipped), num_views):
                    writer.write(np.array(label, "<i4").tobytes() + ids.astype(self._dtype).tobytes())
                    num_records += 1
            if num_records + len(skipped) != end - begin:
                raise InputError(
                    "num_images", end - begin, f"{num_records} records and {len(skipped)} skipped images"
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        entry = {"name": name, "num_records": num_records, "bytes": path.stat().st_size}
        _write_json(self._entry_file(name), {"shard": entry, "skipped": skipped})

    def _checked(self, records: Iterable[Record], num_views: int) -> Iterator[Record]:
        num_labels, vocab_size = len(self._meta["label_names"]), self._meta["vocab_size"]
        shape = (num_views, self._num_tokens)
        for ids, label in records:
            ids = np.asarray(ids)
            if ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
                raise InputError("ids", f"{ids.dtype}{list(ids.shape)}", f"integers {list(shape)}, views by tokens")
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise InputError("ids", f"{ids.min()}..{ids.max()}", f"token ids from 0 to {vocab_size - 1}")
            if not 0 <= label < num_labels:
                raise InputError("label", int(label), f"a class from 0 to {num_labels - 1}")
            yield ids, label

    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """`{"number", "name", "reason"}` of the bad images of every split's finished shards."""
        return {
            split: [bad for name in plan["names"] for bad in (self._finished(name) or {"skipped": []})["skipped"]]
            for split, plan in self._meta["splits"].items()
        }

    def _entry_file(self, name: str) -> Path:
        return self._unfinished / f"{name}.json"

    def _finished(self, name: str) -> dict[str, Any] | None:
        """What a finished shard's own JSON says; None where the shard is still to be written."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(self._entry_file(name).read_text())
            if (self._unfinished / name).stat().st_size == entry["shard"]["bytes"]:
                return entry
        return None

    def _forget_other_work(self, split: str) -> None:
        """Removes a split's shards that an interrupted writer of another cache left."""
        file = self._unfinished / f"{split}-{_IDENTITY_NAME}"
        shared = {key: value for key, value in self._meta.items() if key not in ("splits", "tokenizer_path")}
        identity = {**shared, "split": self._meta["splits"][split]}
        there = None
        with contextlib.suppress(OSError, ValueError):
            there = json.loads(file.read_text())
        if self._process_index == 0 and there != json.loads(json.dumps(identity)):
            for path in self._unfinished.glob(f"{split}-*"):
                path.unlink()
            _write_json(file, identity)
        self._wait()

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is not None:
            if self._process_count == 1 and not list(self._unfinished.glob("*.array_record")):
                shutil.rmtree(self._unfinished)  # there is nothing worth keeping
            return
        self._wait()
        if self._process_index == 0:
            self._put_together()
        self._wait()

    def _put_together(self) -> None:
        splits = {}
        for split, plan in self._meta["splits"].items():
            entries = [self._finished(name) for name in plan["names"]]
            missing = [name for name, entry in zip(plan["names"], entries, strict=True) if entry is None]
            if missing:
                raise InputError("shards", missing[0], f"a finished shard in {self._unfinished}")
            shards = [entry["shard"] for entry in entries]
            splits[split] = {
                "num_records": sum(shard["num_records"] for shard in shards),
                "num_views": plan["num_views"],
                "bytes": sum(shard["bytes"] for shard in shards),
                "shards": shards,
                "transform": plan["transform"],
                "skipped": [bad for entry in entries for bad in entry["skipped"]],
            }
        self._remove_replaced()
        for name in [shard["name"] for split in splits.values() for shard in split["shards"]]:
            os.replace(self._unfinished / name, self._dir / name)
        _write_json(self._dir / META_NAME, {**self._meta, "splits": splits})
        shutil.rmtree(self._unfinished)

    def _remove_replaced(self) -> None:
        """Take away a cache that was here before, its `cache.json` first."""
        with contextlib.suppress(InputError):
            splits = read_meta(self._dir)["splits"].values()
            (self._dir / META_NAME).unlink()
            for shard in [shard for split in splits for shard in split["shards"]]:
                (self._dir / shard["name"]).unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
