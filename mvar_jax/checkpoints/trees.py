"""Weight trees: a folder of arrays with an index, whole trees or items of a checkpoint.

A tree is written under another name and renamed when complete, and the index comes last, so a kill at any moment
leaves the previous state readable.
"""

import glob
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from mvar_jax.checkpoints import arrays, orbax_format
from mvar_jax.checkpoints.arrays import Layout
from mvar_jax.checkpoints.index import INDEX_FILE, Index, Keys, damaged, read_index, unreadable, write_index
from mvar_jax.checkpoints.leaves import file_name, find_difference, flatten, nest, whole_pieces
from mvar_jax.checkpoints.steps import remove_folder
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import remove_leftovers, temporary_path
from mvar_jax.files.paths import as_path, scheme_of

_ITEM = "weights"


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of arrays of this process as the directory `path`, replacing what is there.

    Of several processes the first writes; the others do not wait. An object store cannot replace a directory at once:
    there a tree that is being replaced is no tree until the new one is complete.
    """
    if jax.process_index():
        return
    path = as_path(path)
    if scheme_of(path):
        (path / INDEX_FILE).unlink(missing_ok=True)
        if path.is_dir():
            remove_folder(path)
        _write_tree(path, tree)
        return
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*")
    fresh, old = temporary_path(path), temporary_path(path.with_name(f"{path.name}.old"))
    _write_tree(fresh, tree)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def load_tree(path: str | os.PathLike) -> Any:
    """Load what `save_tree` wrote, in this version or in 0.1: nested dicts of arrays on the default device.

    Raises InputError if there is no such directory or it is damaged.
    """
    path = as_path(path)
    if not path.is_dir():
        words = f"{path} is not a directory of saved weights"
        raise InputError(words, field="checkpoint", given=str(path), expected="a directory of saved weights")
    return orbax_format.read_item(path.absolute(), "") if orbax_format.is_orbax(path) else read_item(path, _ITEM)


def read_item(folder: Path, name: str, abstract: Any = None) -> Any:
    """Load the item `name` of a folder, placed as the ShapeDtypeStructs of `abstract` say.

    Each process reads the parts that its devices hold, and their checksums are checked. Without `abstract` all there
    is, on the default device. Raises InputError if the item is missing or holds other arrays than `abstract`,
    DamagedError if something that was read is damaged.
    """
    items = read_index(folder).items
    if name not in items:
        raise unreadable(folder, f"it has no {name}")
    layouts = items[name]
    if abstract is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        return nest(_read(folder, name, layouts, dict.fromkeys(layouts, one)))
    wanted = flatten(abstract)
    if difference := find_difference(dict(layouts), wanted):
        raise unreadable(folder, difference)
    leaves = _read(folder, name, layouts, {keys: leaf.sharding for keys, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())


def _read(folder: Path, item: str, layouts: dict[Keys, Layout], shardings: dict[Keys, Sharding]) -> dict[Keys, Any]:
    wanted = [(file_name(item, keys), layouts[keys], sharding) for keys, sharding in shardings.items()]
    try:
        return dict(zip(shardings, arrays.read(folder, wanted), strict=True))
    except arrays.ReadError as error:
        if error.is_damage:
            raise damaged(folder, f"{error.name} is damaged ({shorten(error)})") from error
        raise unreadable(folder, f"{error.name}: {shorten(error)}") from error


def _write_tree(folder: Path, tree: Any) -> None:
    pieces = whole_pieces(_ITEM, jax.tree.map(np.asarray, tree))
    arrays.write(folder, pieces)
    layouts = {keys: Layout.of(leaf.dtype, leaf.shape, leaf.shape) for keys, leaf in flatten(tree).items()}
    write_index(folder, Index({_ITEM: layouts}, {}))
