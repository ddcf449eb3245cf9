"""Whether a finished token cache is the one that `cache_tokens` would write, and what has changed if it is not."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.file_source import list_some
from mvar_jax.data.options import DataOptions
from mvar_jax.data.protocols import ImageSource
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.models.networks import Networks
from mvar_jax.tokens.cache_reader import describe_tokenizer, has_ids_of, read_meta

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataOptions)}


def check_same_cache(
    out: Path, networks: Networks, descriptions: dict[str, dict], sources: dict[str, ImageSource]
) -> None:
    """Raise InputError unless the cache in `out` was made of these images by this tokenizer.

    Args:
      out: directory of a finished cache.
      networks: the tokenizer and its weights.
      descriptions: by split, what decides on the pixels.
      sources: the images of each split.
    """
    meta = read_meta(out)
    change = None
    if not has_ids_of(out, networks):
        change = f"of another tokenizer ({describe_tokenizer(meta, networks)})"
    change = change or _changed_data(meta, sources) or _changed_options(meta, descriptions)
    if change:
        message = f"--out {out} holds a token cache {change}: use another folder or delete it"
        raise InputError(message, field="out", given=str(out), expected="the same data and tokenizer")


def _changed_data(meta: dict[str, Any], sources: dict[str, ImageSource]) -> str | None:
    """Return how the images differ from those of the cache, in words."""
    before, now = meta["label_names"], list(sources["train"].label_names)
    for split in dict.fromkeys((*sources, *meta["splits"])):
        entry, source = meta["splits"].get(split), sources.get(split)
        num_before = entry["num_records"] + len(entry.get("skipped", ())) if entry else 0
        num_now = len(source) if source else 0
        if num_before != num_now or before != now:
            counts = f"of {num_before:,} {split} images in {len(before):,} classes"
            return f"{counts}, but the data has {num_now:,} in {len(now):,}{_changed_classes(before, now)}"
        assert entry and source
        num_shards = len(entry["shards"])
        for number, shard in enumerate(entry["shards"]):
            begin, end = (i * num_now // num_shards for i in (number, number + 1))
            # an older cache knows no files
            if "files" in shard and shard["files"] != source.files_digest(np.arange(begin, end), with_sizes=True):
                where = f"between {source.name_of(begin)} and {source.name_of(end - 1)}"
                return f"of other {split} images: {where} files have other names, sizes or labels now"
    return None


def _changed_classes(before: Sequence[str], now: Sequence[str]) -> str:
    added = [name for name in now if name not in set(before)]
    gone = [name for name in before if name not in set(now)]
    parts = [f"{word}: {list_some(names)}" for word, names in (("new", added), ("gone", gone)) if names]
    if not parts and list(before) != list(now):
        parts = ["in another order"]
    return f" ({'; '.join(parts)})" if parts else ""


def _changed_options(meta: dict[str, Any], descriptions: dict[str, dict]) -> str | None:
    """Return how the options of the images differ from those of the cache, in words."""
    for split, given in descriptions.items():
        entry = meta["splits"][split]
        there, knows_files = entry.get("transform") or {}, "files" in entry["shards"][0]
        for name in dict.fromkeys((*given, *there)):
            values = [options.get(name, _DEFAULTS.get(name)) for options in (there, given)]
            if name == "path" and (knows_files or _is_same_place(*values)):
                continue  # the same files at another place are the same data
            if values[0] != values[1]:
                key = "config.seed" if name == "seed" else f"data.{name}"
                return f"made with {key}={values[0]!r}, but it is {values[1]!r} now"
    return None


def _is_same_place(before: str, now: str) -> bool:
    return before == now or _spell(before) == _spell(now)


def _spell(path: str) -> str:
    return str(as_path(path)) if is_store(path) else os.path.realpath(path)
