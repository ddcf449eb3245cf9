"""Weight trees and the items of a checkpoint, written and read by Orbax.

On a file system a tree is written under another name and renamed when complete. A kill at any moment leaves the
previous state readable: `load_tree` also finds a tree that was set aside, and the next writer puts it back.
"""

import functools
import glob
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from mvar_jax.checkpoints import arrays
from mvar_jax.checkpoints.array_handler import tree_handler
from mvar_jax.checkpoints.checksums import check_files, damaged, unreadable, write_checksums
from mvar_jax.checkpoints.quiet import quiet_orbax
from mvar_jax.errors import InputError, find_storage_error, shorten
from mvar_jax.files.atomic import find_replaced, remove_leftovers, replace_directory, sync_tree, temporary_path
from mvar_jax.files.paths import as_path, is_store

TREE_FILE = ocp.path.format_utils.PYTREE_METADATA_FILE  # Orbax's description of a tree


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of arrays of this process as the directory `path`, replacing what is there.

    Of several processes the first writes; the others do not wait. An object store cannot replace a directory at once:
    there a tree that is being replaced is no tree until the new one is complete.
    """
    if jax.process_index():
        return
    path = as_path(path)
    if is_store(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # of a store
        _write_tree(path, tree, path)
        (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).write_text("")  # Orbax's mark of a complete folder
        return
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*")
    fresh = temporary_path(path)
    _write_tree(fresh, tree, path)
    sync_tree(fresh)
    replace_directory(fresh, path)


def load_tree(path: str | os.PathLike) -> Any:
    """Load what `save_tree` wrote: nested dicts of arrays on the default device.

    Raises InputError if there is no such directory or it is damaged.
    """
    path = as_path(path)
    if not is_store(path):
        path = find_replaced(path.absolute())
    if not path.is_dir():
        words = f"{path} is not a directory of saved weights"
        raise InputError(words, field="checkpoint", given=str(path), expected="a directory of saved weights")
    return read_item(path)


def read_item(folder: Path, name: str = "", abstract: Any = None) -> Any:
    """Load the item `name` of a checkpoint, placed as the ShapeDtypeStructs of `abstract` say.

    Each process reads the parts that its devices hold, and their checksums are checked. Without `abstract` all there
    is, on the default device; name "" is a tree on its own. Raises InputError if the item is missing or holds other
    arrays than `abstract`, DamagedError if something that was read is damaged.
    """
    check_files(folder, name)
    try:
        with quiet_orbax():
            return _read_tree(folder, name, abstract)
    except arrays.ReadError as error:
        place = f"{name}/{error.name}".lstrip("/")
        if error.is_damage:
            raise damaged(folder, f"{place} is damaged ({shorten(error)})") from error
        raise unreadable(folder, f"{place}: {shorten(error)}") from error
    except InputError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever their layers raise
        raise unreadable(folder, shorten(error)) from error


def _read_tree(folder: Path, name: str, abstract: Any) -> Any:
    # Orbax's Checkpointer waits for all processes, for ever if one of them meets damage; its handler does not
    handler, path = tree_handler(), epath.Path(folder / name)
    stored = handler.metadata(path).tree
    if abstract is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        describe = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        abstract = jax.tree.map(describe, stored)
    elif difference := _find_difference(stored, abstract):
        raise unreadable(folder, difference)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return handler.restore(path, args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args))


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


def _write_tree(folder: Path, tree: Any, place: Path) -> None:
    """Write a tree. What tensorstore raises of a full disk is raised as OSError of `place`, where it belongs."""
    # Orbax's Checkpointer counts saves, and a count that differs between processes breaks their next save together
    handler, path = tree_handler(), epath.Path(folder)
    with quiet_orbax():
        path.mkdir(parents=True)
        try:
            handler.save(path, args=ocp.args.PyTreeSave(jax.tree.map(np.asarray, tree)))
            handler.finalize(path)
        except ValueError as error:
            if (storage := find_storage_error(error, place)) is None:
                raise
            raise storage from error
    write_checksums(folder, [TREE_FILE])
