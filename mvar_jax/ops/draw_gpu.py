"""Filters and Gumbel draw in one Triton kernel: each row of logits is read once and stays in registers.

The kernel traces `filter_logits` itself, so filters and ties are those of ops/sampling.py. Its sums of probabilities
add in another order than XLA's: a logit whose cumulative probability lies within rounding of 1 - top_p may be kept by
one and removed by the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.sampling import REMOVED, filter_logits, smooth_weights
from mvar_jax.sharding import map_batch

MAX_CODES = 2**13  # a row is held in registers; compiled for sm_90 without spills
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is done to a row; one compiled kernel for each value and shape.

    Attributes:
      top_k, top_p, temperature: as in `SampleOptions`.
      smooth: (scale, number of scales) if the weights of the smooth mode are wanted, None for ids alone.
    """

    top_k: int
    top_p: float
    temperature: float = 1.0
    smooth: tuple[int, int] | None = None
    interpret: bool = False

    def run(self, logits_BNV: jax.Array, keys_B2: jax.Array) -> tuple[jax.Array, ...]:
        """Return ids `[B, N] int32` and, in the smooth mode, weights `[B, N, V] float32`."""
        B, N, V = logits_BNV.shape
        row = pl.BlockSpec((None, None, V), lambda n, b: (b, n, 0))
        key = pl.BlockSpec((None, 2), lambda n, b: (b, 0))
        outputs = [(pl.BlockSpec((None, 1), lambda n, b: (b, n)), jax.ShapeDtypeStruct((B, N), jnp.int32))]
        if self.smooth is not None:
            outputs.append((row, jax.ShapeDtypeStruct((B, N, V), jnp.float32)))
        out_specs, out_shape = zip(*outputs, strict=True)
        return pl.pallas_call(
            functools.partial(draw_row, self),
            grid=(N, B),
            in_specs=[row, key],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=min(max(pl.next_power_of_2(V) // 512, 1), 16)),
            interpret=self.interpret,
            name=draw_row.__name__,
        )(logits_BNV, keys_B2)


def draw_row(kernel: Kernel, logits_ref, key_ref, ids_ref, weights_ref=None):
    """Write the id drawn from one row and, in the smooth mode, the weights of its codes."""
    (V,) = logits_ref.shape
    place_P = jnp.arange(pl.next_power_of_2(V))  # Triton's vectors have power-of-two sizes
    columns = pl.ds(0, len(place_P))
    logits_P = plgpu.load(logits_ref.at[columns], mask=place_P < V, other=REMOVED)
    if kernel.temperature != 1:  # Triton's division is not exact, and XLA multiplies by the inverse of a constant
        logits_P = logits_P * (np.float32(1) / np.float32(kernel.temperature))
    filtered_P = filter_logits(logits_P, 0 if kernel.top_k >= V else kernel.top_k, kernel.top_p)
    noise_P = gumbel_row(key_ref[0], key_ref[1], pl.program_id(0) * V + place_P)
    ids_ref[0] = jnp.argmax(filtered_P + noise_P).astype(jnp.int32)
    if kernel.smooth is not None:
        plgpu.store(weights_ref.at[columns], smooth_weights(filtered_P, noise_P, *kernel.smooth), mask=place_P < V)


def gumbel_row(key_0, key_1, count_P: jax.Array) -> jax.Array:
    """Return elements `count_P` of the flattened `jax.random.gumbel(key, shape, jnp.float32)`, bit for bit.

    By partitionable Threefry, jax's default: element i is a function of the key and i alone.
    """
    a, b = threefry(key_0, key_1, count_P.astype(jnp.uint32))
    one, tiny = np.float32(1).view(np.uint32), np.finfo(np.float32).tiny
    uniform_P = jax.lax.bitcast_convert_type((a ^ b) >> 9 | one, jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform_P, tiny)))


def threefry(key_0, key_1, count_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two words of Threefry-2x32, 20 rounds, for the counts (0, count)."""
    keys = key_0, key_1, key_0 ^ key_1 ^ np.uint32(0x1BD11BDA)
    a, b = jnp.full_like(count_P, keys[0]), count_P + keys[1]
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            a = a + b
            b = a ^ (b << distance | b >> 32 - distance)
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return a, b


def why_not(logits_BNV: jax.Array, keys_B: jax.Array) -> str | None:
    """Return the reason that the kernel does not draw from these logits with these keys, or None if it does."""
    _, N, V = logits_BNV.shape
    if current_platform() != "gpu":
        return f"it runs on gpu, this is {current_platform()}"
    if V > MAX_CODES:
        return f"{V} codes are more than {MAX_CODES}"
    if logits_BNV.dtype != jnp.float32:
        return f"logits are {logits_BNV.dtype}, not float32"
    is_partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]  # missing from stubs
    if str(jax.random.key_impl(keys_B)) != "threefry2x32" or not is_partitionable:
        return "keys are not of partitionable Threefry"
    if jax.config.jax_high_dynamic_range_gumbel:  # type: ignore[attr-defined]  # missing from stubs
        return "jax_high_dynamic_range_gumbel is set"
    return None if N * V < 2**32 else "a sample has 2^32 logits or more"


def draw_filtered(kernel: Kernel, logits_BNV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, ...]:
    """Run the kernel, on each device for its own samples."""
    return map_batch(kernel.run, logits_BNV, jax.random.key_data(keys_B))
