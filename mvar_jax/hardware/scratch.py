"""What the libraries of a CPU hold while a program runs, which XLA's figure of its memory does not have.

XLA plans a program's arrays. The libraries that multiply for it, Eigen and YNNPACK, copy operands into the order in
which they read them. Which copies they make was found by counting every allocation of single operations (jax 0.10 and
0.11); benchmarks/RESULTS.md compares whole programs.
"""

import math
import os
from collections.abc import Iterator

from mvar_jax.hardware.program_text import Computation, Instruction, parse
from mvar_jax.hardware.work import labels_of

YNNPACK = "__ynn_fusion"
MOST_DEPTH = 528  # values of a window that Eigen copies at once: counted for a window of 784 values
# Eigen's copies: all windows of a convolution, the products of a transposed one. YNNPACK's: the second operand of a
# product, inner values of a fusion that are read in another shape.
WINDOWS, TRANSPOSED, SECOND, RESHAPED = "windows", "transposed", "second", "reshaped"


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scratch_bytes(text: str, cores: int) -> int:
    """Return the bytes that libraries hold at once while a compiled program runs on a CPU.

    On several cores instructions that do not need each other run at the same time: the largest copy of each kind
    counts. On one core it is the largest of all, and Eigen needs no copy of all windows.
    """
    program, largest = parse(text), dict.fromkeys((WINDOWS, TRANSPOSED, SECOND, RESHAPED), 0)
    for step in program.steps():
        it = step.instruction
        fused = program.fused(it) if YNNPACK in it.line else {}
        for kind, num_bytes in _copies_of_ynnpack(fused) if fused else _copies_of_eigen(it, step.around):
            largest[kind] = max(largest[kind], num_bytes)
    if cores > 1:
        return sum(largest.values())
    return max(num_bytes for kind, num_bytes in largest.items() if kind != WINDOWS)


def _copies_of_ynnpack(fused: Computation) -> Iterator[tuple[str, int]]:
    """Yield (kind, bytes) of a fusion that YNNPACK takes."""
    for it in fused.values():
        if it.op in ("dot", "convolution"):
            yield SECOND, fused[it.operands[1]].size
    inner = (it for it in fused.values() if it.op == "bitcast" and fused[it.operands[0]].op != "parameter")
    yield RESHAPED, sum(it.size for it in inner)


def _copies_of_eigen(it: Instruction, around: Computation) -> Iterator[tuple[str, int]]:
    """Yield (kind, bytes) of a convolution that Eigen takes."""
    if it.op != "convolution":
        return
    (of_input, of_kernel, _), out = labels_of(it), it.arrays[0]
    sides, kernel = (around[name].arrays[0].sides for name in it.operands)
    channels, features = (kernel[of_kernel.index(label)] for label in "io")
    window = math.prod(side for side, label in zip(kernel, of_kernel, strict=True) if label.isdigit())
    if "lhs_dilate" in it.line:
        places = math.prod(sides) // sides[of_input.index("f")]
        yield TRANSPOSED, places * (window * features + channels) * out.width
    else:
        places = math.prod(out.sides) // features
        yield WINDOWS, places * min(window * channels, MOST_DEPTH) * out.width
