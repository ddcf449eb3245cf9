"""Checkpoints and weight trees of version 0.1, in Orbax's format: read only, with the checksums of whole files."""

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from mvar_jax.checkpoints.index import damaged, unreadable
from mvar_jax.checkpoints.leaves import find_difference, flatten
from mvar_jax.errors import InputError, shorten

CHECKSUM_FILE = "checksums.json"


def is_orbax(folder: Path) -> bool:
    """Return whether a folder was written by version 0.1."""
    return (folder / CHECKSUM_FILE).exists()


def has_item(folder: Path, name: str) -> bool:
    """Return whether a checkpoint was written with an item of this name."""
    return any(file.startswith(f"{name}/") for file in _read_checksums(folder))


def read_item(folder: Path, name: str, abstract: Any = None) -> Any:
    """Load the item `name` of a checkpoint, placed as the ShapeDtypeStructs of `abstract` say.

    Without `abstract` all there is, on the default device; name "" is a tree on its own. Raises InputError if the
    item is missing or damaged, or holds other arrays than `abstract`.
    """
    if not has_item(folder, name) and name:
        raise unreadable(folder, f"it has no {name}")
    if damage := _find_damage(folder, f"{name}/" if name else ""):
        raise damaged(folder, damage)
    import orbax.checkpoint as ocp  # takes seconds, and only old checkpoints need it

    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(folder / name).item_metadata.tree
            if abstract is None:
                sharding = SingleDeviceSharding(jax.local_devices()[0])
                abstract = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored
                )
            elif difference := find_difference(flatten(stored), flatten(abstract)):
                raise unreadable(folder, difference)
            return checkpointer.restore(folder / name, args=ocp.args.StandardRestore(abstract))
    except InputError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever their layers raise
        raise damaged(folder, shorten(error)) from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop Orbax's log records: it repeats the errors that it raises anyway."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _read_checksums(folder: Path) -> dict[str, int]:
    try:
        return dict(json.loads((folder / CHECKSUM_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, f"{CHECKSUM_FILE}: {shorten(error)}") from None


def _find_damage(folder: Path, prefix: str) -> str | None:
    """Return in a few words what is wrong with the files whose names begin with `prefix`."""
    for name, value in _read_checksums(folder).items():
        if not name.startswith(prefix):
            continue
        try:
            is_whole = _checksum(folder / name) == value
        except OSError:
            return f"{name} is missing"
        if not is_whole:
            return f"{name} is damaged"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
