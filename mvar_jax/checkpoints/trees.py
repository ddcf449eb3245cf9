"""Weight trees on disk through Orbax, with checksums.

Everything is written under another name and renamed when complete, so a kill at any moment leaves the previous state
readable. Orbax does not notice changed bytes inside an array, hence the checksums.
"""

import contextlib
import functools
import glob
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import remove_leftovers, temporary_path, write_atomically

CHECKSUM_FILE = "checksums.json"
# Orbax stamps the second when it commits, so its bytes are not final when the checksums are taken.
_UNSUMMED_FILES = (CHECKSUM_FILE, "_CHECKPOINT_METADATA")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop Orbax's log records: it narrates every save through absl and repeats the errors that it raises anyway."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of arrays of this process as the directory `path`, replacing what is there.

    Of several processes the first writes; the others do not wait.
    """
    if jax.process_index():
        return
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*")
    fresh, old = temporary_path(path), temporary_path(path.with_name(f"{path.name}.old"))
    alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="save_tree")
    with quiet_orbax(), ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        checkpointer.save(fresh, jax.tree.map(np.asarray, tree))
    write_checksums(fresh)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def load_tree(path: str | os.PathLike) -> Any:
    """Load what `save_tree` wrote: nested dicts of arrays on the default device.

    Raises InputError if there is no such directory or it is damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        words = f"{path} is not a directory of saved weights"
        raise InputError(words, field="checkpoint", given=str(path), expected="a directory of saved weights")
    if damage := _find_damage(path):
        raise _unreadable(path, damage)
    return _read_tree(path)


def read_item(folder: Path, name: str, abstract: Any = None) -> Any:
    """Load the item `name` of a checkpoint, placed as the ShapeDtypeStructs of `abstract` say.

    Without `abstract` all there is, on the default device. Raises InputError if the item is missing or damaged, or
    holds other arrays than `abstract`.
    """
    if not (folder / name).is_dir():
        raise _unreadable(folder, f"it has no {name}")
    if damage := _find_damage(folder, f"{name}/"):
        raise _unreadable(folder, damage)
    return _read_tree(folder / name, abstract)


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder into it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in _UNSUMMED_FILES)
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in sorted(files)}
    write_atomically(folder / CHECKSUM_FILE, json.dumps(sums, indent=0))


def read_checksums(folder: Path) -> dict[str, int]:
    """Return file name -> checksum. Raises InputError if the list is missing or unreadable."""
    try:
        return json.loads((folder / CHECKSUM_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, f"{CHECKSUM_FILE}: {shorten(error)}") from None


def _read_tree(folder: Path, abstract: Any = None) -> Any:
    try:
        with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            if abstract is None:
                sharding = SingleDeviceSharding(jax.local_devices()[0])
                abstract = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored
                )
            elif difference := _find_difference(stored, abstract):
                raise _unreadable(folder, difference)
            return checkpointer.restore(folder, args=ocp.args.StandardRestore(abstract))
    except InputError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever their layers raise
        raise _unreadable(folder, shorten(error)) from error


def _find_difference(stored: Any, abstract: Any) -> str | None:
    # Orbax would convert other dtypes silently, and its own messages span many lines.
    stored, wanted = _describe_leaves(stored), _describe_leaves(abstract)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            return f"{name} is {stored.get(name, 'absent')}, in this model {wanted.get(name, 'absent')}"
    return None


def _describe_leaves(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name_of(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _find_damage(folder: Path, prefix: str = "") -> str | None:
    """Return in a few words what is wrong with the files whose names begin with `prefix`."""
    for name, value in read_checksums(folder).items():
        if not name.startswith(prefix):
            continue
        try:
            is_whole = _checksum(folder / name) == value
        except OSError:
            return f"{name} is missing"
        if not is_whole:
            return f"{name} is damaged"
    return None


def _unreadable(folder: Path, reason: str) -> InputError:
    words = f"checkpoint {folder} cannot be read: {reason}"
    return InputError(words, field="checkpoint", given=str(folder), expected="a readable checkpoint of this model")
