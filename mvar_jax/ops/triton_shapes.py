"""Shapes of the programs of the Triton attention kernels: the largest without register spills, found by compiling.

Hopper and the B200 multiply blocks from shared memory. Other GPUs keep both operands in registers: their blocks are
smaller. Prepared bfloat16 on Hopper was also the fastest of twelve shapes measured there (benchmarks/RESULTS.md).
"""

import jax.numpy as jnp

from mvar_jax.ops.platform import BLACKWELL_DATACENTER, HOPPER
from mvar_jax.ops.triton_operands import Prepared, Raw

# form, dtype is float32, heads are wider than 64: (block_q, block_k, num_warps) forward and backward
FROM_SHARED_MEMORY = {
    (Prepared, False, False): ((64, 64, 4), (64, 64, 4)),
    (Raw, False, False): ((64, 64, 4), (64, 32, 4)),
    (Prepared, False, True): ((32, 32, 4), (32, 32, 4)),
    (Raw, False, True): ((32, 32, 8), (32, 32, 8)),
    (Prepared, True, False): ((32, 32, 8), (32, 32, 8)),
    (Raw, True, False): ((16, 16, 8), (16, 16, 8)),
    (Prepared, True, True): ((16, 16, 8), (16, 16, 8)),
    (Raw, True, True): ((16, 16, 8), (16, 16, 8)),
}
FROM_REGISTERS = {
    (Prepared, False, False): ((64, 64, 4), (32, 32, 4)),
    (Raw, False, False): ((64, 32, 4), (32, 32, 4)),
    (Prepared, False, True): ((64, 32, 4), (64, 32, 8)),
    (Raw, False, True): ((64, 32, 8), (32, 32, 8)),
    (Prepared, True, False): ((32, 32, 8), (32, 32, 8)),
    (Raw, True, False): ((32, 32, 8), (16, 16, 8)),
    (Prepared, True, True): ((16, 16, 4), (16, 16, 8)),
    (Raw, True, True): ((16, 16, 8), (16, 16, 8)),
}


def block_shapes(form, dtype, head_width: int, generation: int) -> tuple[tuple[int, int, int], ...]:
    """Return (block_q, block_k, num_warps) of the forward and of the backward kernel.

    generation: major compute capability of the GPU (ops/platform.py).
    """
    table = FROM_SHARED_MEMORY if generation in (HOPPER, BLACKWELL_DATACENTER) else FROM_REGISTERS
    return table[form, dtype == jnp.float32, head_width > 64]
