"""Writing a token cache shard by shard. Resumable: an interrupted and restarted writer leaves the same files."""

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import replacing, write_json
from mvar_jax.files.directories import remove_tree
from mvar_jax.files.json_files import read_json
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.processes.holding import check_options
from mvar_jax.scales import areas_of
from mvar_jax.tokens.cache_reader import FORMAT, LABEL_BYTES, META_NAME, TOKENIZER_FOLDER, read_meta
from mvar_jax.tokens.finished import FinishedShards
from mvar_jax.tokens.shards import writing_shard

UNFINISHED = "unfinished"  # folder inside the cache's that holds the shards until the last one is finished
_IDENTITY_NAME = "identity.json"
_NUM_UPLOADS = 2  # at once, each of a shard that lies on a disk of this machine
_NUM_MOVES = 16  # at once, inside a store
_NO_IDENTITY = ("splits", "tokenizer_path", "tokenizer", "tokenizer_ids")  # no part of a split's identity

Record = tuple[np.ndarray, int]
# (begin, end, skipped) -> the records of images begin to end; bad ones are appended to `skipped` instead
ReadRecords = Callable[[int, int, list[dict[str, Any]]], Iterable[Record]]


class Identity(TypedDict):
    """What tells an unfinished cache from others, as far as its classes need it."""

    label_names: list[str]


def classes_in(out: Path) -> list[str]:
    """Return the classes of a token cache, finished or not, in the order of their labels; [] if there is none."""
    if (out / META_NAME).exists():
        return read_meta(out)["label_names"]
    with contextlib.suppress(OSError, ValueError):
        return read_json(out / UNFINISHED / f"train-{_IDENTITY_NAME}", Identity)["label_names"]
    return []


class CacheWriter:
    """Writes a token cache split by split; the cache appears when the `with` block ends without an exception.

    Until then its shards are in the folder `unfinished` of `out_dir`. The next writer of the same cache keeps
    them, a writer of another cache is refused. An older cache in `out_dir` stays until the new one is complete.
    Several processes share the work: shard i belongs to process `i % process_count`, and process 0 puts the cache
    together. In an object store a shard is uploaded in the background while the next one is written.

        with CacheWriter(out_dir, ...) as writer:
            writer.write_split("train", read_records, num_images=1437, num_views=2, transform={...})
            writer.write_split("val", ...)

    Args:
      out_dir: directory of the cache, on this machine or in an object store.
      sides, vocab_size: of the tokenizer.
      tokenizer_fingerprint, tokenizer_path: stored for the reader.
      tokenizer_ids: `ids_fingerprint` of the tokenizer, which tokenizers with other decoders share; "" if unknown.
      label_names: display name of each class, in the order of the labels.
      save_tokenizer: writes the tokenizer into a folder of the cache, so that the cache works where it is copied to.
        If None, the cache has no tokenizer of its own.
      process_index, process_count: of this process.
      wait: returns once all processes have called it.
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
        tokenizer_ids: str = "",
        save_tokenizer: Callable[[Path], None] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        self._dir = as_path(out_dir, "out")
        self._unfinished = self._dir / UNFINISHED
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            **({"tokenizer_ids": tokenizer_ids} if tokenizer_ids else {}),
            "tokenizer_path": str(tokenizer_path),
            "tokenizer": save_tokenizer and TOKENIZER_FOLDER,
            "sides": [int(side) for side in sides],
            "vocab_size": vocab_size,
            "dtype": self._dtype.name,
            "label_names": list(label_names),
            "splits": {},
        }
        self._num_tokens = sum(areas_of(self._meta["sides"]))
        self._save_tokenizer = save_tokenizer
        self._finished = FinishedShards(self._dir, self._unfinished)
        self._uploads = ThreadPoolExecutor(_NUM_UPLOADS, thread_name_prefix="token_uploads")
        self._uploading: deque[Future[None]] = deque()
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
        files_of: Callable[[int, int], str] = lambda begin, end: "",
    ) -> None:
        """Write this process's shards of one split; finished ones are kept if they are of the same files.

        Args:
          split: name of the split.
          read_records: returns (integer ids [num_views, L], label) of every good image of a range, in order.
          num_images: number of images, bad ones included.
          num_views: views of each image.
          transform: how the images were transformed before encoding; stored, not interpreted.
          num_shards: files over which the images are spread in order.
          files_of: (begin, end) -> a digest of the files of these images, stored with their shard; "" if unknown.

        Raises:
          InputError: ids or labels are out of range, ids have another shape or are no integers, records and
            skipped images do not add up, or there are shards of another cache. Shards finished before stay.
        """
        if not 1 <= num_shards <= num_images:
            allowed = f"1 to {num_images}, the number of images"
            message = f"num_shards must be from {allowed}, got {num_shards}"
            raise InputError(message, field="num_shards", given=num_shards, expected=allowed)
        bounds = [shard * num_images // num_shards for shard in range(num_shards + 1)]
        names = [f"{split}-{shard:05d}-of-{num_shards:05d}.array_record" for shard in range(num_shards)]
        plan = {"num_images": num_images, "num_views": num_views, "transform": transform, "names": names}
        plan["compressed"] = False
        self._meta["splits"][split] = plan
        self._check_identity(split)
        for shard in range(self._process_index, num_shards, self._process_count):
            name, begin, end = names[shard], bounds[shard], bounds[shard + 1]
            files = files_of(begin, end)
            record_bytes = LABEL_BYTES + num_views * self._num_tokens * self._dtype.itemsize
            if not self._finished.has(name, record_bytes, files):
                self._finished.forget(name)
                self._write_shard(name, read_records, begin, end, num_views, files)
        self._wait_for_uploads(0)

    def _write_shard(
        self, name: str, read_records: ReadRecords, begin: int, end: int, num_views: int, files: str
    ) -> None:
        path, skipped, num_records = self._unfinished / name, [], 0
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(path))
            with writing_shard(temporary, path) as write:
                for ids, label in self._checked(read_records(begin, end, skipped), num_views):
                    write(np.array(label, "<i4").tobytes() + ids.astype(self._dtype).tobytes())
                    num_records += 1
            if num_records + len(skipped) != end - begin:
                found = f"{num_records} records and {len(skipped)} skipped images"
                message = f"num_images {end - begin} must be the sum of {found} of {name}"
                raise InputError(message, field="num_images", given=end - begin, expected=found)
            entry = {"name": name, "num_records": num_records, "bytes": temporary.stat().st_size}
            entry |= {"files": files} if files else {}
            finish = stack.pop_all()

        def put_in_place() -> None:
            finish.close()
            self._finished.note(name, entry, skipped)

        if is_store(path):
            self._wait_for_uploads(_NUM_UPLOADS)
            self._uploading.append(self._uploads.submit(put_in_place))
        else:
            put_in_place()

    def _wait_for_uploads(self, num_left: int) -> None:
        """Wait until so many uploads are under way; raise what one of the others raised."""
        while len(self._uploading) > num_left:
            self._uploading.popleft().result()

    def _checked(self, records: Iterable[Record], num_views: int) -> Iterator[Record]:
        num_labels, vocab_size = len(self._meta["label_names"]), self._meta["vocab_size"]
        shape = (num_views, self._num_tokens)
        for ids, label in records:
            ids = np.asarray(ids)
            if ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
                raise _refuse("ids", f"{ids.dtype}{list(ids.shape)}", f"integers {list(shape)}, views by tokens")
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise _refuse("ids", f"{ids.min()} to {ids.max()}", f"from 0 to {vocab_size - 1}")
            if not 0 <= label < num_labels:
                raise _refuse("label", int(label), f"a class from 0 to {num_labels - 1}")
            yield ids, label

    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """Return `{"number", "name", "reason"}` of the bad images of every split's finished shards."""
        return {
            split: [bad for name in plan["names"] for bad in (self._finished.get(name) or {"skipped": []})["skipped"]]
            for split, plan in self._meta["splits"].items()
        }

    def _check_identity(self, split: str) -> None:
        """Raise InputError if an interrupted writer of another cache left shards of a split."""
        file = self._unfinished / f"{split}-{_IDENTITY_NAME}"
        shared = {key: value for key, value in self._meta.items() if key not in _NO_IDENTITY}
        plan = self._meta["splits"][split]
        # where the images lie is no matter, since each shard has a digest of its files
        transform = {key: value for key, value in plan["transform"].items() if key != "path"}
        identity = {**shared, "split": plan | {"transform": transform}}
        there = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            there = read_json(file, Any)
        identity = json.loads(json.dumps(identity))
        if self._process_index == 0 and there != identity:
            if isinstance(there, dict) and list(self._unfinished.glob(f"{split}-*.array_record")):
                check_options("out", f"the shards of an interrupted run in {self._unfinished}", there, identity)
            write_json(file, identity)
        self._wait()

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._uploads.shutdown(cancel_futures=exception_type is not None)
        if exception_type is not None:
            with contextlib.suppress(OSError):  # of a store that is gone
                if self._process_count == 1 and not list(self._unfinished.glob("*.array_record")):
                    remove_tree(self._unfinished)  # there is nothing worth keeping
            return
        self._wait()
        if self._process_index == 0:
            self._put_together()
        self._wait()

    def _put_together(self) -> None:
        splits = {}
        for split, plan in self._meta["splits"].items():
            entries = []
            for name in plan["names"]:
                if (entry := self._finished.get(name)) is None:
                    message = f"shard {name} is not finished in {self._unfinished}; run the command again"
                    raise InputError(message, field="shards", given=name, expected="a finished shard")
                entries.append(entry)
            shards = [entry["shard"] for entry in entries]
            splits[split] = {
                "num_records": sum(shard["num_records"] for shard in shards),
                "num_views": plan["num_views"],
                "bytes": sum(shard["bytes"] for shard in shards),
                "compressed": plan["compressed"],
                "shards": shards,
                "transform": plan["transform"],
                "skipped": [bad for entry in entries for bad in entry["skipped"]],
            }
        self._remove_replaced()
        names = [shard["name"] for split in splits.values() for shard in split["shards"]]
        with ThreadPoolExecutor(_NUM_MOVES if is_store(self._dir) else 1) as threads:
            list(threads.map(self._move, names))
        if self._save_tokenizer:
            self._save_tokenizer(self._dir / TOKENIZER_FOLDER)
        write_json(self._dir / META_NAME, {**self._meta, "splits": splits})
        remove_tree(self._unfinished)

    def _move(self, name: str) -> None:
        """Move a shard to its place, unless a killed writer has done so. A store copies it and removes the first."""
        if (self._unfinished / name).exists():
            (self._unfinished / name).rename(self._dir / name)

    def _remove_replaced(self) -> None:
        """Remove the older cache, its `cache.json` first."""
        with contextlib.suppress(InputError):
            splits = read_meta(self._dir)["splits"].values()
            (self._dir / META_NAME).unlink()
            remove_tree(self._dir / TOKENIZER_FOLDER)
            for shard in [shard for split in splits for shard in split["shards"]]:
                (self._dir / shard["name"]).unlink(missing_ok=True)


def _refuse(field: str, given: object, expected: str) -> InputError:
    return InputError(f"{field} must be {expected}, got {given}", field=field, given=given, expected=expected)
