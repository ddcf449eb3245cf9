"""The device mesh, and the one table from logical axis names to mesh axes; no other file names a mesh axis."""

import collections
import contextlib
import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mvar_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
# fsdp if the config leaves it open: usual for the cards of a host, and beyond it programs for TPUs multiply in parts
# or add up whole gradients (docs/scaling.md)
WIDEST_CHOSEN = 8

RULES = {
    "batch": ("data", "fsdp"),
    "tokens": None,
    "layers": None,
    "width": "fsdp",  # D of the transformer's matrices
    "heads": "tensor",
    "head_width": None,
    "hidden": "tensor",  # 4 D inside the feed-forward
    "vocab": "tensor",
    "code": None,  # codebook width c
    "classes": None,
    "adaptive": None,  # the 6 (or 2) adaptive vectors
    "channels_in": "fsdp",
    "channels_out": "tensor",
    "space": None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None, dimensions: dict | None = None
) -> Mesh:
    """Return a mesh over all devices; one axis may be -1 and takes the devices that are left, or data and fsdp may.

    Args:
      data: devices that share a batch and each hold a copy of the state; -1: all remaining devices.
      fsdp: devices that share a batch and split the state by width; -1: all remaining devices, or if data is -1 too,
        the largest number up to 8 that divides them and the widths.
      tensor: devices that split heads, the hidden layer, channels and the vocabulary.
      devices: devices to use; None for all.
      dimensions: what the mesh splits, as for `check_sizes`; needed if data and fsdp are -1.

    Raises:
      InputError: the product of the axes is not the number of devices, or `tensor` crosses processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            expected = "a number of devices, or -1 for those that are left"
            raise InputError(
                f"mesh.{name} must be {expected}, got {size}", field=f"mesh.{name}", given=size, expected=expected
            )
    if data == fsdp == -1 and dimensions is not None and tensor != -1:
        splits = [size for logical_axis, size in dimensions.values() if RULES[logical_axis] == "fsdp"]
        common = math.gcd(len(devices) // tensor, *splits)
        sizes["fsdp"] = max(size for size in range(1, WIDEST_CHOSEN + 1) if common % size == 0)
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    fits = given > 0 and len(devices) % given == 0 if free else given == len(devices)
    if len(free) > 1 or not fits:
        expected = (
            f"axes whose product is {len(devices)}, the number of devices (one axis may be -1, or data and fsdp)"
        )
        raise InputError(f"mesh must have {expected}, got {sizes}", field="mesh", given=sizes, expected=expected)
    if free:
        sizes[free[0]] = len(devices) // given
    counts = collections.Counter(device.process_index for device in devices)
    if len(counts) > 1 and (smallest := min(counts.values())) % sizes["tensor"]:
        expected = f"a divisor of {smallest}, the number of devices of one process"
        message = f"mesh.tensor must be {expected}, got {sizes['tensor']}"
        raise InputError(message, field="mesh.tensor", given=sizes["tensor"], expected=expected)
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shapes(num_devices: int, most_tensor: int = 1) -> list[dict[str, int]]:
    """Return the sizes of all meshes of so many devices, as for `make_mesh`: fsdp rises, then tensor."""
    sizes = range(1, num_devices + 1)
    return [
        dict(zip(MESH_AXES, (num_devices // (fsdp * tensor), fsdp, tensor), strict=True))
        for tensor in sizes[:most_tensor]
        for fsdp in sizes
        if num_devices % (fsdp * tensor) == 0
    ]


def wider_meshes(mesh: Mesh) -> list[Mesh]:
    """Return the meshes of the same devices and tensor axis whose fsdp axis is larger, smallest first."""
    data, fsdp, tensor = mesh.shape.values()
    shapes = [shape for shape in mesh_shapes(data * fsdp) if shape["fsdp"] > fsdp]
    return [make_mesh(**(shape | {"tensor": tensor}), devices=list(mesh.devices.flat)) for shape in shapes]


def spec_of(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the mesh axes of each dimension.

    Raises KeyError for an unknown name, ValueError if two dimensions share a mesh axis.
    """
    mesh_axes = [None if name is None else RULES[name] for name in logical_axes]
    flat = [axis for entry in mesh_axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {logical_axes} put one mesh axis on two dimensions: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrain an activation's sharding inside jit; return it unchanged if no mesh is set.

    A dimension of size 1, such as the one row of "no class", stays whole.
    """
    spec = spec_of(logical_axes)  # before the return, so that a misspelt name fails on one device too
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*(None if size == 1 else entry for size, entry in zip(x.shape, spec, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def is_split(logical_axis: str) -> bool:
    """Return whether the context's mesh splits a dimension of this name over more than one device."""
    mesh, entry = jax.sharding.get_abstract_mesh(), spec_of((logical_axis,))[0]
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return any(mesh.shape.get(name, 1) > 1 for name in names)


@flax.struct.dataclass
class Named(nn.Partitioned):
    """A parameter with logical axis names; `shardings_of` alone decides its placement."""

    def unbox(self, apply_constraint: bool = True):
        """Return the bare array; flax's own method would read the names as mesh axes."""
        return self.value


def named_axes(init, *logical_axes: str | None):
    """Return an initializer whose parameter carries logical axis names."""
    spec_of(logical_axes)
    return functools.wraps(init)(lambda *args, **kwargs: Named(init(*args, **kwargs), names=logical_axes))


def shardings_of(abstract_boxed_params, mesh: Mesh):
    """Return the NamedShardings of a tree of parameters boxed by `named_axes`.

    Unboxed leaves are replicated. A dimension that the mesh does not divide is not sharded, see `whole_dimensions`.
    """

    def sharding(leaf):
        if not isinstance(leaf, Named):
            return NamedSharding(mesh, PartitionSpec())
        entries = list(spec_of(leaf.names))
        for i in _not_divided(leaf, mesh):
            entries[i] = None
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(sharding, abstract_boxed_params, is_leaf=lambda x: isinstance(x, Named))


def _not_divided(leaf: Named, mesh: Mesh) -> list[int]:
    """Return the dimensions of a parameter that the mesh would split but does not divide."""
    named = enumerate(zip(leaf.names, leaf.value.shape, strict=True))
    return [i for i, (name, size) in named if name is not None and size % num_shards_of(name, mesh)]


def whole_dimensions(abstract_boxed_params, mesh: Mesh) -> list[str]:
    """Return what stays whole on every device since the mesh does not divide it, and what that costs.

    Such as "channels_in=3, 2 times, 15 KiB more on each device": of the parameters, once.
    """
    leaves = jax.tree.leaves(abstract_boxed_params, is_leaf=lambda x: isinstance(x, Named))
    found: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for leaf in leaves:
        whole = _not_divided(leaf, mesh) if isinstance(leaf, Named) else []
        for i in whole:
            others = [name for j, name in enumerate(leaf.names) if name is not None and j not in whole]
            held_bytes = math.prod(leaf.value.shape) * leaf.value.dtype.itemsize
            held_bytes /= math.prod(num_shards_of(name, mesh) for name in others)
            saved_share = 1 - 1 / num_shards_of(leaf.names[i], mesh)
            found[leaf.names[i], leaf.value.shape[i]].append(held_bytes * saved_share)
    return [
        f"{name}={size}, {len(costs)} times, {sum(costs) / 2**10:,.1f} KiB more on each device"
        for (name, size), costs in sorted(found.items())
    ]


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps one whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def num_shards_of(logical_axis: str, mesh: Mesh) -> int:
    """Return the number of shards of a dimension of this name. Raises KeyError for an unknown name."""
    entry = RULES[logical_axis]
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[axis] for axis in axes)


def check_batch_size(batch_size: int, mesh: Mesh, num_parts: int = 1) -> None:
    """Raise InputError unless each of `num_parts` equal parts of the batch divides over the mesh's batch axes."""
    num_shards = num_shards_of("batch", mesh)
    divisor = num_shards * num_parts
    if batch_size < 1 or batch_size % divisor:
        parts = f" times {num_parts} accumulate_steps" if num_parts > 1 else ""
        expected = f"a positive multiple of {divisor} (devices that share a batch: {num_shards}{parts})"
        message = f"batch_size must be {expected}, got {batch_size}"
        raise InputError(message, field="batch_size", given=batch_size, expected=expected)


def check_sizes(sizes: dict[str, tuple[str, int]], mesh: Mesh) -> None:
    """Raise InputError if the mesh does not divide one of the dimensions; the message says what would fit.

    sizes: name of a dimension in the config -> (logical axis, size).
    """
    for name, (logical_axis, size) in sizes.items():
        num_shards, field = num_shards_of(logical_axis, mesh), f"mesh.{RULES[logical_axis]}"
        if size % num_shards:
            common = math.gcd(size, math.prod(mesh.shape.values()))
            fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            expected = f"a divisor of {name}={size} and of the number of devices ({fits})"
            advice = "set mesh.data and mesh.fsdp to -1, or" if field == "mesh.fsdp" else "or set"
            instead = size - size % num_shards or num_shards
            message = f"{field} must be {expected}, got {num_shards}; {advice} {name} to a multiple such as {instead}"
            raise InputError(message, field=field, given=num_shards, expected=expected)


def map_rows(fn, rows, num_together: int):
    """Apply fn to the rows of a tree of arrays `[B, ...]` in chunks of at most `num_together` rows on each device.

    Each device that shares the batch works on its own rows. The last row is repeated to fill the last chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    B = jax.tree.leaves(rows)[0].shape[0]
    num_shards = 1 if mesh.empty else num_shards_of("batch", mesh)
    num_shards = num_shards if B % num_shards == 0 else 1
    num_own = B // num_shards
    if num_together >= num_own:
        return fn(rows)
    num_chunks = -(-num_own // num_together)
    each = -(-num_own // num_chunks)

    def split(x):
        x = x.reshape(num_shards, num_own, *x.shape[1:])
        x = jnp.concatenate([x, *[x[:, -1:]] * (num_chunks * each - num_own)], axis=1)
        x = x.reshape(num_shards, num_chunks, each, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2)) if num_shards > 1 else x

    def run_chunk(chunk):
        chunk = jax.tree.map(lambda x: x.reshape(num_shards * each, *x.shape[2:]), chunk)
        return jax.tree.map(lambda x: x.reshape(num_shards, each, *x.shape[1:]), fn(chunk))

    def join(x):
        x = x.swapaxes(0, 1).reshape(num_shards, num_chunks * each, *x.shape[3:])
        return x[:, :num_own].reshape(B, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(run_chunk, jax.tree.map(split, rows)))


def map_batch(fn, *arrays):
    """Run fn on arrays `[B, ...]`, on each device of the context's mesh for the samples that it holds.

    For kernels, which XLA cannot partition. Without the project's mesh, inside shard_map or if the mesh does not
    divide B, fn runs on the whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return fn(*arrays)
    spec = spec_of(("batch",) if len(arrays[0]) % num_shards_of("batch", mesh) == 0 else ())
    return jax.shard_map(fn, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this process's rows as global arrays sharded over the batch axes."""
    sharding = NamedSharding(mesh, spec_of(("batch",)))
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def batch_like(mesh: Mesh, **arrays: tuple[tuple[int, ...], str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a batch of `put_batch` as shapes. arrays: (shape over all processes, dtype) by name."""
    sharding = NamedSharding(mesh, spec_of(("batch",)))
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in arrays.items()}


def place(tree, shardings):
    """Return a tree of arrays on the devices of their shardings; a tree of shapes gets the shardings alone.

    shardings: a tree like it, or one for all leaves.
    """
    if not is_abstract(tree):
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def is_abstract(tree) -> bool:
    """Return whether a tree has shapes instead of arrays, as to compile without weights."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Return a context in which `constrain` applies."""
    return jax.set_mesh(mesh)
