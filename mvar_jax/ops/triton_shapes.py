"""Shapes of the programs of the Triton attention kernels: the largest without register spills, found by compiling.

Hopper multiplies blocks from shared memory. Other GPUs keep both operands in registers, so their blocks are smaller.
Prepared bfloat16 forward on Hopper was also the fastest of twelve shapes measured there (benchmarks/RESULTS.md).
"""

import jax.numpy as jnp

from mvar_jax.ops.platform import HOPPER
from mvar_jax.ops.triton_operands import Prepared, Raw

# form, dtype is float32, heads are wider than 64: (block_q, block_k, num_warps) forward and backward
OF_HOPPER = {
    (Prepared, False, False): ((64, 64, 4), (64, 64, 4)),
    (Raw, False, False): ((64, 64, 4), (64, 32, 4)),
    (Prepared, False, True): ((32, 32, 4), (32, 32, 4)),
    (Raw, False, True): ((32, 32, 8), (32, 32, 8)),
    (Prepared, True, False): ((32, 32, 8), (32, 32, 8)),
    (Raw, True, False): ((16, 16, 8), (16, 16, 8)),
    (Prepared, True, True): ((16, 16, 8), (16, 16, 8)),
    (Raw, True, True): ((16, 16, 8), (16, 16, 8)),
}
OF_OTHERS = {
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
    table = OF_HOPPER if generation == HOPPER else OF_OTHERS
    return table[form, dtype == jnp.float32, head_width > 64]
