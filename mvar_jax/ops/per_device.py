"""Make a kernel, opaque to XLA, work like an XLA operation under vmap and with sharded batch or heads."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mvar_jax.ops.platform import current_platform
from mvar_jax.sharding import MESH_AXES, spec_of

# the axes of an array that may be sharded, in the letters of `per_device`
BATCH, HEADS = "b", "h"


def shardings_like(first: NamedSharding, its_axes: str, axes: tuple[str, ...]) -> tuple[NamedSharding, ...]:
    """Return shardings with batch and heads as in the first array and the other axes whole."""
    of_axis = dict(zip(its_axes, (*first.spec, *(None,) * len(its_axes)), strict=False))
    placed = {axis: of_axis[axis] for axis in (BATCH, HEADS)}
    return tuple(NamedSharding(first.mesh, PartitionSpec(*map(placed.get, letters))) for letters in axes)


def partition_batch_and_heads(kernel, in_axes, out_axes, constant_ranks):
    """Return `kernel` partitioned over batch and heads: each device runs it on its own part."""
    call = custom_partitioning(kernel)
    num_constants = len(constant_ranks)
    constant_axes = [tuple(f"c{i}_{j}" for j in range(rank)) for i, rank in enumerate(constant_ranks)]
    side = lambda axes: ", ".join(" ".join(names) for names in axes)

    def partition(mesh, operands, results):
        first = operands[num_constants].sharding
        whole = (NamedSharding(first.mesh, PartitionSpec()),) * num_constants
        like_first = functools.partial(shardings_like, first, in_axes[0])
        return mesh, kernel, like_first(out_axes), (*whole, *like_first(in_axes))

    def infer(mesh, operands, results):
        return shardings_like(operands[num_constants].sharding, in_axes[0], out_axes)

    # in the order of their first use, as the partitioner asks
    others = [axis for axis in dict.fromkeys("".join((*in_axes, *out_axes))) if axis not in (BATCH, HEADS)]
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{side([*constant_axes, *in_axes])} -> {side(out_axes)}",
        need_replication_factors=(*(name for names in constant_axes for name in names), *others),
    )
    return call


def map_over_mesh(kernel, in_axes, out_axes, constants, arrays):
    """Run `kernel` in shard_map, batch and heads sharded over the context's mesh by the rules of `sharding`.

    For TPUs, whose compiler does not support custom partitioning. Inside shard_map, or without the project's mesh,
    the kernel runs on the arrays as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return kernel(*constants, *arrays)
    (batch, heads), size = spec_of(("batch", "heads")), dict(zip(in_axes[0], arrays[0].shape, strict=True))
    num_devices = lambda axes: math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    placed = {BATCH: batch if size[BATCH] % num_devices(batch) == 0 else None}
    placed[HEADS] = heads if size[HEADS] % num_devices(heads) == 0 else None
    specs = lambda axes: tuple(PartitionSpec(*map(placed.get, letters)) for letters in axes)
    in_specs = (*(PartitionSpec(),) * len(constants), *specs(in_axes))
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=specs(out_axes), check_vma=False)(*constants, *arrays)


def per_device(kernel, in_axes: tuple[str, ...], out_axes: tuple[str, ...], constants: tuple = ()):
    """Return a function of arrays that runs a kernel and supports vmap and sharding.

    The function is not differentiable; wrap it in `jax.custom_vjp`.

    Args:
      kernel: (*constants, *arrays) -> tuple of arrays, independent over batch and heads.
      in_axes, out_axes: a letter for each axis of each array: b for batch, h for heads, any other for axes that every
        device holds whole; such as "bnhk". The first input and all outputs have a batch.
      constants: arrays that every device holds whole.
    """
    partitioned = partition_batch_and_heads(kernel, in_axes, out_axes, tuple(x.ndim for x in constants))

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        if current_platform() == "tpu":
            return map_over_mesh(kernel, in_axes, out_axes, constants, arrays)
        return partitioned(*constants, *arrays)

    @call.def_vmap
    def fold_into_batch(size, is_batched, *operands):
        spread = lambda x, has_axis: x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
        has_batch = [BATCH in letters for letters in in_axes]
        if any(mapped and not folds for mapped, folds in zip(is_batched, has_batch, strict=True)):
            whole = tuple(map(spread, operands, is_batched))
            return jax.lax.map(lambda arrays: call(*arrays), whole), (True,) * len(out_axes)
        fold = lambda x, mapped, folds: spread(x, mapped).reshape(-1, *x.shape[1 + mapped :]) if folds else x
        results = call(*map(fold, operands, is_batched, has_batch))
        results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return call
