"""The leaves of a tree of arrays: their keys, names and shapes, and which process writes which part of them."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from jax.sharding import Sharding

from mvar_jax.checkpoints.arrays import Index, Layout, Piece, plain_index, whole_index
from mvar_jax.checkpoints.index import Keys


def flatten(tree: Any) -> dict[Keys, Any]:
    """Return the keys from the root to each leaf, and the leaf."""
    return {tuple(map(_plain, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(leaves: dict[Keys, Any]) -> Any:
    """Return nested dicts and lists of leaves: what `flatten` took apart, if it was made of dicts and lists."""
    if () in leaves:
        return leaves[()]
    children: dict[str | int, dict[Keys, Any]] = {}
    for keys, leaf in leaves.items():
        children.setdefault(keys[0], {})[keys[1:]] = leaf
    nested = {key: nest(below) for key, below in children.items()}
    return [nested[key] for key in sorted(nested)] if nested and all(isinstance(k, int) for k in nested) else nested


def file_name(item: str, keys: Keys) -> str:
    """Return the name of an array's folder."""
    return "/".join([item, *(quote(str(key), safe="") for key in keys)])


def find_difference(stored: dict[Keys, Any], wanted: dict[Keys, Any]) -> str | None:
    """Return in a few words the first leaf that differs between two flat trees of anything with dtype and shape."""
    for keys in sorted(stored.keys() | wanted.keys(), key=str):
        here, there = _describe(stored.get(keys)), _describe(wanted.get(keys))
        if here != there:
            return f"{'.'.join(map(str, keys))} is {here}, in this model {there}"
    return None


def layouts_of(tree: Any) -> dict[Keys, Layout]:
    """Return how each leaf is stored. All processes return the same for a tree of global arrays."""
    return {
        keys: Layout.of(leaf.dtype, leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        for keys, leaf in flatten(tree).items()
    }


def own_pieces(items: dict[str, Any]) -> list[Piece]:
    """Copy what this process writes of trees of global arrays to the host: the arrays may be donated afterwards.

    items: name -> tree of jax.Array.
    """
    named = [(file_name(item, keys), leaf) for item, tree in items.items() for keys, leaf in flatten(tree).items()]
    plan = _plan(tuple((leaf.dtype, leaf.shape, leaf.sharding) for _, leaf in named))
    shards = [{shard.device: shard.data for shard in leaf.addressable_shards} for _, leaf in named]
    for number, device, _ in plan:
        shards[number][device].copy_to_host_async()
    pieces = []
    for number, device, indices in plan:
        name, leaf = named[number]
        layout = Layout.of(leaf.dtype, leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        shard = leaf.sharding.addressable_devices_indices_map(leaf.shape)[device]
        starts = [part.start for part in plain_index(shard, leaf.shape)]
        values = np.asarray(shards[number][device])
        if device.platform == "cpu":  # a view of the device's memory
            values = values.copy()
        for index in indices:
            inside = tuple(slice(i.start - start, i.stop - start) for i, start in zip(index, starts, strict=True))
            pieces.append(Piece(name, layout, index, values[inside]))
    return pieces


def whole_pieces(item: str, tree: Any) -> list[Piece]:
    """Return all objects of a tree of arrays on the host."""
    pieces = []
    for keys, leaf in flatten(tree).items():
        layout = Layout.of(leaf.dtype, leaf.shape, leaf.shape)
        indices = layout.objects_in(whole_index(leaf.shape))
        pieces += [Piece(file_name(item, keys), layout, index, leaf[index]) for index in indices]
    return pieces


@functools.lru_cache(maxsize=2)
def _plan(leaves: tuple[tuple[Any, tuple[int, ...], Sharding], ...]) -> list[tuple[int, Any, list[Index]]]:
    """Return what this process writes: (number of the leaf, own device, objects of the device's shard).

    Of the processes that hold an object the one with the least to write so far writes it; all compute the same.
    """
    loads: Counter[int] = Counter()
    plan: list[tuple[int, Any, list[Index]]] = []
    layouts = [Layout.of(dtype, shape, sharding.shard_shape(shape)) for dtype, shape, sharding in leaves]
    for number in sorted(range(len(leaves)), key=lambda number: (-layouts[number].object_bytes, number)):
        _, shape, sharding = leaves[number]
        for index, devices in _holders(shape, sharding):
            own: list[Index] = []
            for part in layouts[number].objects_in(index):
                writer = min(devices, key=lambda process: (loads[process], process))
                loads[writer] += layouts[number].object_bytes
                if writer == jax.process_index():
                    own.append(part)
            if own:
                plan.append((number, devices[jax.process_index()], own))
    return plan


def _holders(shape: tuple[int, ...], sharding: Sharding) -> Sequence[tuple[Index, dict[int, Any]]]:
    """Return each shard with the processes that hold it and their first device that does."""
    holders: dict[tuple, tuple[Index, dict[int, Any]]] = {}
    device: Any
    for device, index in sharding.devices_indices_map(shape).items():
        plain = plain_index(index, shape)
        starts = tuple(part.start for part in plain)
        devices = holders.setdefault(starts, (plain, {}))[1]
        if device.process_index not in devices or device.id < devices[device.process_index].id:
            devices[device.process_index] = device
    return [holders[starts] for starts in sorted(holders)]


def _plain(key: Any) -> str | int:
    """Return a key of JAX as its name or number."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            value = getattr(key, name)
            return value if isinstance(value, int) else str(value)
    return str(key)


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
