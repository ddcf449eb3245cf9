"""Make a kernel, opaque to XLA, work like an XLA operation under vmap and with sharded batch or heads."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mvar_jax.ops.platform import current_platform
from mvar_jax.sharding import MESH_AXES, spec_of

# rank -> axes of a kernel's inputs and outputs; batch and heads may be sharded
AXES = {4: ("b", "n", "h", "k"), 3: ("b", "h", "n")}
BATCH, HEADS = "b", "h"


def specs_like(q_sharding: NamedSharding, ranks: tuple[int, ...]) -> tuple[NamedSharding, ...]:
    """Return shardings with batch and heads as in q `[B, N, H, K]` and the other axes whole."""
    spec = (*q_sharding.spec, *(None,) * 4)
    of_axis = {BATCH: spec[0], HEADS: spec[2]}
    named = lambda rank: PartitionSpec(*(of_axis.get(axis) for axis in AXES[rank]))
    return tuple(NamedSharding(q_sharding.mesh, named(rank)) for rank in ranks)


def partition_batch_and_heads(kernel, in_ranks, out_ranks, constant_ranks):
    """Return `kernel` partitioned over batch and heads: each device runs it on its own part."""
    call = custom_partitioning(kernel)
    num_constants = len(constant_ranks)
    constant_axes = [tuple(f"c{i}_{j}" for j in range(rank)) for i, rank in enumerate(constant_ranks)]
    in_axes = [*constant_axes, *(AXES[rank] for rank in in_ranks)]
    side = lambda axes: ", ".join(" ".join(names) for names in axes)

    def partition(mesh, operands, results):
        q_sharding = operands[num_constants].sharding
        whole = (NamedSharding(q_sharding.mesh, PartitionSpec()),) * num_constants
        return mesh, kernel, specs_like(q_sharding, out_ranks), (*whole, *specs_like(q_sharding, in_ranks))

    def infer(mesh, operands, results):
        return specs_like(operands[num_constants].sharding, out_ranks)

    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{side(in_axes)} -> {side(AXES[rank] for rank in out_ranks)}",
        need_replication_factors=(*(name for names in constant_axes for name in names), "n", "k"),
    )
    return call


def map_over_mesh(kernel, out_ranks, constants, arrays):
    """Run `kernel` in shard_map, batch and heads sharded over the context's mesh by the rules of `sharding`.

    For TPUs, whose compiler does not support custom partitioning. Inside shard_map, or without the project's mesh,
    the kernel runs on the arrays as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.manual_axes:
        return kernel(*constants, *arrays)
    (batch, heads), (B, _, H, _) = spec_of(("batch", "heads")), arrays[0].shape
    num_devices = lambda axes: math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    placed = {BATCH: batch if B % num_devices(batch) == 0 else None}
    placed[HEADS] = heads if H % num_devices(heads) == 0 else None
    specs = lambda ranks: tuple(PartitionSpec(*(placed.get(axis) for axis in AXES[rank])) for rank in ranks)
    in_specs = (*(PartitionSpec(),) * len(constants), *specs([x.ndim for x in arrays]))
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=specs(out_ranks), check_vma=False)(*constants, *arrays)


def per_device(kernel, in_ranks: tuple[int, ...], out_ranks: tuple[int, ...], constants: tuple = ()):
    """Return a function of arrays that runs a kernel and supports vmap and sharding.

    The function is not differentiable; wrap it in `jax.custom_vjp`.

    Args:
      kernel: (*constants, *arrays) -> tuple of arrays, independent over batch and heads.
      in_ranks, out_ranks: 4 for `[B, N, H, K]`, 3 for `[B, H, N]`.
      constants: arrays that every device holds whole.
    """
    partitioned = partition_batch_and_heads(kernel, in_ranks, out_ranks, tuple(x.ndim for x in constants))

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        if current_platform() == "tpu":
            return map_over_mesh(kernel, out_ranks, constants, arrays)
        return partitioned(*constants, *arrays)

    @call.def_vmap
    def fold_into_batch(size, is_batched, *operands):
        spread = lambda x, has_axis: x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
        whole = [spread(x, has_axis) for x, has_axis in zip(operands, is_batched, strict=True)]
        results = call(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return call
