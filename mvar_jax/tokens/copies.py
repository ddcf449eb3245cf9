"""Copies of a store's shards on a disk of this machine, shared by its processes and kept for the next run."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import remove_leftovers, replacing
from mvar_jax.files.stores import StorePath

_NUM_FETCHES = 4  # at once in the background
_SUFFIX = ".array_record"


class Shard(Protocol):
    """A shard in a store: its object, and its entry in `cache.json`."""

    path: StorePath
    entry: dict[str, Any]


def default_folder() -> Path:
    """Return this user's folder of copies on a disk of this machine. Raises InputError if it is someone else's."""
    folder = Path(tempfile.gettempdir()) / f"mvar_jax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.stat().st_uid == os.getuid()
    except OSError:
        is_ours = False
    if not is_ours:
        words = f"{folder} belongs to another user or cannot be made; set config.data.cache_folder"
        raise InputError(words, field="config.data.cache_folder", given="", expected="a folder of this user")
    return folder / "shards"


class Copies:
    """Whole shards of one cache, as many as a limit allows: always the same ones, in the order of `entries`.

    Every batch needs records of nearly all shards, so a copy is never given up for another of the same cache. Shards
    beyond the limit have no copy. Copies of other caches in the folder go first, the least recently opened first.

    Args:
      root: folder of the copies of all caches.
      cache: the cache in its store.
      meta: contents of its `cache.json`; another cache at the same place has other copies.
      limit_bytes: of all copies in `root`.

    Attributes:
      missing_bytes: of the shards that have no copy.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(self, root: str | os.PathLike, cache: StorePath, meta: dict[str, Any], limit_bytes: int):
        contents = f"{cache} {json.dumps(meta, sort_keys=True)}"
        self._root = Path(root)
        self._folder = self._root / hashlib.sha256(contents.encode()).hexdigest()[:16]
        self.limit_bytes, self.missing_bytes = limit_bytes, 0
        self._planned: set[str] = set()
        room = limit_bytes
        for split in sorted(meta["splits"].values(), key=lambda split: split["num_records"]):  # evaluation first
            for entry in split["shards"]:
                room -= entry["bytes"]
                if room >= 0:
                    self._planned.add(entry["name"])
                else:
                    self.missing_bytes += entry["bytes"]
        self._is_started = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            words = f"config.data.cache_folder={root} cannot be written: {shorten(error)}"
            raise InputError(
                words, field="config.data.cache_folder", given=str(root), expected="a writable folder"
            ) from None

    def __getstate__(self):
        return {**self.__dict__, "_is_started": False}  # threads are of one process

    def find(self, shard: Shard) -> Path | None:
        """Return the copy of a shard if it is here."""
        path = self._folder / shard.path.name
        with contextlib.suppress(OSError):
            if shard.entry["name"] in self._planned and path.stat().st_size == shard.entry["bytes"]:
                os.utime(path)
                return path
        return None

    def fetch(self, shard: Shard) -> Path | None:
        """Return the copy of a shard, fetched now if it is not here; None if the limit leaves no room for it."""
        if shard.entry["name"] not in self._planned:
            return None
        path, num_bytes = self._folder / shard.path.name, shard.entry["bytes"]
        with _holding(self._folder / f".{path.name}.lock"):  # one process fetches for all
            if self.find(shard) is None:
                remove_leftovers(self._folder, f"{glob.escape(path.name)}.*")
                self._make_room(num_bytes)
                with replacing(path) as temporary:
                    shard.path.download(temporary)
                    if (found := temporary.stat().st_size) != num_bytes:
                        raise OSError(errno.EIO, f"{path.name} has {found} bytes, not {num_bytes} as in cache.json")
        return path

    def fetch_in_background(self, shards: Iterable[Shard]) -> None:
        """Begin to fetch these shards, unless that has begun. An error ends it; records are then read one by one."""
        if self._is_started:
            return
        self._is_started = True
        planned = [shard for shard in shards if shard.entry["name"] in self._planned]
        first = os.getpid() % max(1, len(planned))  # processes of one machine begin with different shards
        waiting = iter(planned[first:] + planned[:first])

        def work() -> None:
            for shard in waiting:  # a list's iterator, which threads may share
                try:
                    self.fetch(shard)
                except OSError as error:
                    words = f"{shard.path} is not copied to {self._folder}: {shorten(error)}"
                    print(f"{words}; its records are read one by one", file=sys.stderr, flush=True)
                    return

        for _ in range(min(_NUM_FETCHES, len(planned))):
            threading.Thread(target=work, daemon=True).start()

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently opened copies of other caches until this many bytes fit."""
        with _holding(self._root / ".lock"):
            found = []
            for path in self._root.glob(f"*/*{_SUFFIX}"):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime_ns, path, path.stat().st_size))
            total = sum(size for _, _, size in found) + num_bytes
            for _, path, size in sorted(found):
                if total <= self.limit_bytes:
                    break
                if path.parent != self._folder:
                    path.unlink(missing_ok=True)
                    total -= size


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Hold a lock among the processes and threads of this machine. Without locks the same copy is fetched twice."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
