"""Makes a kernel, opaque to XLA, behave like an XLA operation under vmap and under sharded batch or heads."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

# the axes of every array that a kernel takes or returns, by rank; batch and heads may be sharded
AXES = {4: ("b", "n", "h", "k"), 3: ("b", "h", "n")}
BATCH, HEADS = "b", "h"


def specs_like(q_sharding: NamedSharding, ranks: tuple[int, ...]) -> tuple[NamedSharding, ...]:
    """Batch and heads as the first operand [B, N, H, K] has them, the other axes whole."""
    spec = (*q_sharding.spec, *(None,) * 4)
    of_axis = {BATCH: spec[0], HEADS: spec[2]}
    named = lambda rank: PartitionSpec(*(of_axis.get(axis) for axis in AXES[rank]))
    return tuple(NamedSharding(q_sharding.mesh, named(rank)) for rank in ranks)


def partition_batch_and_heads(kernel, in_ranks, out_ranks, constant_ranks):
    """`kernel` run on each device's share of batch and heads."""
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


def per_device(kernel, in_ranks: tuple[int, ...], out_ranks: tuple[int, ...], constants: tuple = ()):
    """kernel: (*constants, *arrays) -> tuple of arrays, independent over batch and heads; this is a function of
    the arrays that does the same, with vmap and sharding.

    Ranks: 4 for [B, N, H, K], 3 for [B, H, N]. Not differentiable: give it to a `jax.custom_vjp`.
    """
    partitioned = partition_batch_and_heads(kernel, in_ranks, out_ranks, tuple(x.ndim for x in constants))
    call = jax.custom_batching.custom_vmap(functools.partial(partitioned, *constants))

    @call.def_vmap
    def fold_into_batch(size, is_batched, *operands):
        spread = lambda x, has_axis: x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
        whole = [spread(x, has_axis) for x, has_axis in zip(operands, is_batched, strict=True)]
        results = call(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return call
