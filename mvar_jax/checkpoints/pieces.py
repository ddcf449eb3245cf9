"""Which process writes which part of the arrays of a tree."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from mvar_jax.checkpoints.arrays import Index, Layout, Piece, plain_index, whole_index


def layout_of(array: jax.Array) -> Layout:
    """Return how an array is stored. All processes return the same for a global array."""
    return Layout.of(array.dtype, array.shape, array.sharding.shard_shape(array.shape))


def own_pieces(named: Sequence[tuple[str, jax.Array]]) -> list[Piece]:
    """Copy what this process writes of arrays to the host: the arrays may be donated afterwards."""
    plan = _plan(tuple((array.dtype, array.shape, array.sharding) for _, array in named))
    shards = [{shard.device: shard.data for shard in array.addressable_shards} for _, array in named]
    for number, device, _ in plan:
        shards[number][device].copy_to_host_async()
    pieces = []
    for number, device, indices in plan:
        name, array = named[number]
        shard = array.sharding.addressable_devices_indices_map(array.shape)[device]
        starts = [part.start for part in plain_index(shard, array.shape)]
        values = np.asarray(shards[number][device])
        if device.platform == "cpu":  # a view of the device's memory
            values = values.copy()
        for index in indices:
            inside = tuple(slice(i.start - start, i.stop - start) for i, start in zip(index, starts, strict=True))
            pieces.append(Piece(name, layout_of(array), index, values[inside]))
    return pieces


def whole_pieces(named: Sequence[tuple[str, np.ndarray]]) -> list[Piece]:
    """Return all objects of arrays on the host."""
    pieces = []
    for name, array in named:
        layout = Layout.of(array.dtype, array.shape, array.shape)
        indices = layout.objects_in(whole_index(array.shape))
        pieces += [Piece(name, layout, index, array[index]) for index in indices]
    return pieces


@functools.lru_cache(maxsize=8)
def _plan(arrays: tuple[tuple[Any, tuple[int, ...], Sharding], ...]) -> list[tuple[int, Any, list[Index]]]:
    """Return what this process writes: (number of the array, own device, objects of the device's shard).

    Of the processes that hold an object the one with the least to write so far writes it; all compute the same.
    """
    loads: Counter[int] = Counter()
    plan: list[tuple[int, Any, list[Index]]] = []
    layouts = [Layout.of(dtype, shape, sharding.shard_shape(shape)) for dtype, shape, sharding in arrays]
    for number in sorted(range(len(arrays)), key=lambda number: (-layouts[number].object_bytes, number)):
        _, shape, sharding = arrays[number]
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
