"""The mesh and the one table from logical axis names to mesh axes. No other file names a mesh axis."""

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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """Return a mesh over all devices; one axis may be -1 and takes the devices that are left.

    Args:
      data: devices that share a batch and each hold a copy of the state.
      fsdp: devices that share a batch and split the state by width.
      tensor: devices that split heads, the hidden layer, channels and the vocabulary.
      devices: devices to use; None for all.

    Raises:
      InputError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    fits = given > 0 and len(devices) % given == 0 if free else given == len(devices)
    if len(free) > 1 or not fits:
        raise InputError(
            "mesh", sizes, f"axes whose product is {len(devices)}, the number of devices (one may be -1)"
        )
    if free:
        sizes[free[0]] = len(devices) // given
    if jax.process_count() > 1 and jax.local_device_count() % sizes["tensor"]:
        raise InputError(
            "mesh.tensor", sizes["tensor"], f"a divisor of {jax.local_device_count()}, the devices of one process"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of each dimension. Raises KeyError for an unknown name, ValueError for a mesh axis used twice."""
    mesh_axes = [None if name is None else RULES[name] for name in logical_axes]
    flat = [axis for entry in mesh_axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {logical_axes} put one mesh axis on two dimensions: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation's sharding inside jit; the identity where no mesh is set."""
    spec = spec_of(logical_axes)  # a misspelt name must fail on one device too
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


@flax.struct.dataclass
class Named(nn.Partitioned):
    """A parameter that carries logical axis names. Placement is decided once, by `shardings_of`."""

    def unbox(self, apply_constraint: bool = True):
        """The bare array; flax's own would read the names as mesh axes."""
        return self.value


def named_axes(init, *logical_axes: str | None):
    """An initializer whose parameter carries logical axis names."""
    spec_of(logical_axes)
    return functools.wraps(init)(lambda *args, **kwargs: Named(init(*args, **kwargs), names=logical_axes))


def shardings_of(abstract_boxed_params, mesh: Mesh):
    """NamedShardings of a tree of parameters boxed by `named_axes`; unboxed leaves are replicated.

    A dimension that the mesh does not divide stays whole.
    """

    def sharding(leaf):
        if not isinstance(leaf, Named):
            return NamedSharding(mesh, PartitionSpec())
        entries = list(spec_of(leaf.names))
        for i, entry in enumerate(entries):
            axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
            if leaf.value.shape[i] % math.prod(mesh.shape[a] for a in axes):
                entries[i] = None
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(sharding, abstract_boxed_params, is_leaf=lambda x: isinstance(x, Named))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def ways_of(logical_axis: str, mesh: Mesh) -> int:
    """Into how many pieces the mesh cuts a dimension of this name. Raises KeyError for an unknown name."""
    entry = RULES[logical_axis]
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[axis] for axis in axes)


def check_batch_size(batch_size: int, mesh: Mesh, num_parts: int = 1) -> None:
    """Raises InputError unless the batch divides over the mesh's batch axes, in each of `num_parts` parts."""
    ways = ways_of("batch", mesh)
    if batch_size < 1 or batch_size % (ways * num_parts):
        parts = f" times {num_parts}, the parts of accumulate_steps" if num_parts > 1 else ""
        raise InputError(
            "batch_size",
            batch_size,
            f"a multiple of {ways * num_parts}: {ways}, the devices that share a batch{parts}",
        )


def check_sizes(sizes: dict[str, tuple[str, int]], mesh: Mesh) -> None:
    """sizes: what the config calls a dimension -> (logical axis, size).

    Raises InputError naming the first that the mesh does not divide, and the axis sizes and sizes that would fit.
    """
    for name, (logical_axis, size) in sizes.items():
        ways = ways_of(logical_axis, mesh)
        if size % ways:
            fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise InputError(
                f"mesh.{RULES[logical_axis]}",
                ways,
                f"a divisor of {name}={size} ({fits}), or a {name} such as {size - size % ways or ways}",
            )


def map_rows(fn, rows, num_together: int):
    """fn over the rows of a tree of arrays [B, ...], `num_together` or fewer at a time on each device.

    The devices that share a batch each go through their own rows. Rows are repeated to fill the last turn.
    """
    mesh = jax.sharding.get_abstract_mesh()
    B = jax.tree.leaves(rows)[0].shape[0]
    ways = 1 if mesh.empty else ways_of("batch", mesh)
    ways = ways if B % ways == 0 else 1
    num_own = B // ways
    if num_together >= num_own:
        return fn(rows)
    num_turns = -(-num_own // num_together)
    each = -(-num_own // num_turns)

    def split(x):
        x = x.reshape(ways, num_own, *x.shape[1:])
        x = jnp.concatenate([x, *[x[:, -1:]] * (num_turns * each - num_own)], axis=1)
        x = x.reshape(ways, num_turns, each, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2)) if ways > 1 else x

    def take_turn(part):
        part = jax.tree.map(lambda x: x.reshape(ways * each, *x.shape[2:]), part)
        return jax.tree.map(lambda x: x.reshape(ways, each, *x.shape[1:]), fn(part))

    def join(x):
        x = x.swapaxes(0, 1).reshape(ways, num_turns * each, *x.shape[3:])
        return x[:, :num_own].reshape(B, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(take_turn, jax.tree.map(split, rows)))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays sharded over the batch axes."""
    sharding = NamedSharding(mesh, spec_of(("batch",)))
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Context in which `constrain` applies."""
    return jax.set_mesh(mesh)
