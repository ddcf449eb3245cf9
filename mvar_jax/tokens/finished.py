"""Shards that the writer of a token cache has finished, kept until the whole cache is."""

import contextlib
import sys
from pathlib import Path
from typing import Any, TypedDict

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import write_json
from mvar_jax.files.json_files import read_json
from mvar_jax.tokens.cache_reader import Shard
from mvar_jax.tokens.shards import LocalShard, on_this_machine


class Entry(TypedDict):
    """The own JSON file of a finished shard; `skipped` lists its bad images, as `Skipped` does."""

    shard: Shard
    skipped: list[dict[str, Any]]


class FinishedShards:
    """The finished shards of a cache by name, each with a JSON file of its own.

    Args:
      out_dir: the cache's folder.
      unfinished: the folder in it that holds the shards until the last one is finished.
    """

    def __init__(self, out_dir: Path, unfinished: Path):
        self._dir, self._unfinished = out_dir, unfinished
        self._entries: dict[str, Entry] = {}

    def _file(self, name: str) -> Path:
        return self._unfinished / f"{name}.json"

    def note(self, name: str, shard: dict[str, Any], skipped: list[dict[str, Any]]) -> None:
        """Write that a shard, which is in its place, is finished."""
        write_json(self._file(name), {"shard": shard, "skipped": skipped})

    def forget(self, name: str) -> None:
        """Remove the note of a shard that is to be written again."""
        self._entries.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def get(self, name: str) -> Entry | None:
        """Return the entry of a finished shard, or None if the shard is still to be written."""
        if name in self._entries:
            return self._entries[name]
        with contextlib.suppress(FileNotFoundError, ValueError):
            entry = read_json(self._file(name), Entry)
            if self._find(name, entry["shard"]):
                self._entries[name] = entry
                return entry
        return None

    def _find(self, name: str, shard: Shard) -> Path | None:
        """Return where a shard of this size is: a writer killed while it put the cache together has moved some."""
        for path in (self._unfinished / name, self._dir / name):
            if path.is_file() and path.stat().st_size == shard["bytes"]:
                return path
        return None

    def has(self, name: str, record_bytes: int, files: str) -> bool:
        """Return whether an earlier writer finished a shard that is undamaged.

        Args:
          name: of the shard.
          record_bytes: size of its records.
          files: digest of the files that it must be of, "" if unknown.
        """
        entry = self.get(name)
        path = entry and self._find(name, entry["shard"])
        if not entry or not path or entry["shard"].get("files", "") != files:
            return False
        try:
            with on_this_machine(path) as file:
                LocalShard(file, {**entry["shard"]}, record_bytes, self._dir).read_all()
        except (InputError, RuntimeError) as error:
            print(f"{path} is written again: {shorten(error)}", file=sys.stderr, flush=True)
            return False
        return True
