"""The work of a compiled program on one device: products, bytes and collectives, loops multiplied out."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from mvar_jax.hardware.program_text import Array, Computation, Instruction, Step, Text, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
CHAINED, STARTS = "chain_id=", '"AsyncCollectiveStart"'  # marks of a TPU's exchanges that several fusions share
_WIDE = ("f32", "f64", "s32", "u32")

# (name of a custom kernel, its operands) -> FLOPs, 0 if it is no kernel of ours
KernelFlops = Callable[[str, list[Array]], float]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the runs of one instruction do, each.

    Attributes:
      times: how often it runs.
      flops: of its products: two for each multiply-accumulate.
      num_bytes: read and written in the device's memory.
      dtype: of the products' operands, float32 or bfloat16 (any 16 bits).
    """

    times: int
    flops: float
    num_bytes: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: as XLA calls it.
      times: how often it runs.
      num_bytes: of the whole array that each device of a group ends up with, gives or adds to.
      num_devices: of a group.
      num_hosts: of a group.
      origin: the operation that it was made for.
    """

    kind: str
    times: int
    num_bytes: float
    num_devices: int
    num_hosts: int
    origin: str

    @property
    def sent_bytes(self) -> float:
        """Return the bytes that a device sends, all runs together, in a ring."""
        n = self.num_devices
        if n == 1:
            return 0.0
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.num_bytes * factor


def work_of(
    text: str, hosts: tuple[int, ...], kernel_flops: KernelFlops = lambda name, operands: 0.0
) -> tuple[list[Work], list[Collective]]:
    """Return (work, collectives) of a compiled program.

    Args:
      text: the program.
      hosts: host of each device, in the order of the mesh.
      kernel_flops: counts custom kernels, which XLA's text does not tell.
    """
    program, works, collectives = parse(text), [], []
    for step in program.steps():
        it = step.instruction
        if (kind := it.op.removesuffix("-start")) in COLLECTIVES:
            collectives.append(_collective(kind, it, step, hosts))
            continue
        fused = program.fused(it)
        inside = [part for part in fused.values() if part.op in COLLECTIVES]
        for part in inside:
            if CHAINED in part.line and not any(STARTS in other.line for other in fused.values()):
                continue  # a later part of an exchange that goes on beside products
            # a TPU's reduce-scatter is a fusion of an all-reduce and a slice
            kind = "reduce-scatter" if "all-reduce-scatter" in (it.called or "") else part.op
            collectives.append(_collective(kind, part, Step(part, step.times, fused), hosts))
        flops, dtype = _flops(program, it, step.around, kernel_flops)
        if flops or not inside:
            works.append(Work(step.times, flops, program.traffic(step), dtype))
    return works, collectives


def _collective(kind: str, it: Instruction, step: Step, hosts: tuple[int, ...]) -> Collective:
    groups = _groups(it, len(hosts))
    largest = max(groups, key=len)
    operands = [array for name in it.operands for array in step.around[name].arrays]
    num_bytes = sum(array.width * math.prod(array.sides) for array in operands)
    num_bytes *= len(largest) if kind == "all-gather" else 1
    num_hosts = max(len({hosts[i] for i in group}) for group in groups)
    origin = it.attribute(r'op_name="([^"]*)"') or ""
    return Collective(kind, step.times, num_bytes, len(largest), num_hosts, origin)


def _groups(it: Instruction, num_devices: int) -> list[list[int]]:
    """Return the groups of devices that exchange, by their places in the mesh."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", it.line):
        sides = [int(side) for side in found[3].split(",")]
        ids = np.arange(math.prod(sides)).reshape(sides)
        if found[4]:
            ids = ids.transpose([int(axis) for axis in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2])).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", it.line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names = list(sizes)
        own = [names.index(name) for name in re.findall(r"'(\w+)'", found[2])]
        ids = np.moveaxis(
            np.arange(math.prod(sizes.values())).reshape(list(sizes.values())), own, range(-len(own), 0)
        )
        return ids.reshape(-1, math.prod(sizes[names[i]] for i in own)).tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", it.line)
    groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", found[1])] if found else []
    return groups or [list(range(num_devices))]


def _flops(program: Text, it: Instruction, around: Computation, kernel_flops: KernelFlops) -> tuple[float, str]:
    """Return (FLOPs, dtype) of the products of one instruction."""
    if fused := program.fused(it):
        parts = [_flops(program, part, fused, kernel_flops) for part in fused.values()]
        return sum(flops for flops, _ in parts), next((dtype for flops, dtype in parts if flops), "bfloat16")
    operands = [around[name].arrays[0] for name in it.operands if name in around and around[name].arrays]
    dtype = "float32" if operands and operands[0].dtype in _WIDE else "bfloat16"
    if it.op == "dot":
        return _product_flops(it, operands[0], r"lhs_contracting_dims=\{([\d,]*)\}"), dtype
    if it.op == "convolution":
        return _convolution_flops(it, operands), dtype
    if it.op != "custom-call":
        return 0.0, dtype
    target = it.attribute(r'custom_call_target="([^"]+)"') or ""
    if "cublas" in target or "matmul" in target:
        return _product_flops(it, operands[0], r'lhs_contracting_dimensions":\[([\d,"]*)\]'), dtype
    if "cudnn$conv" in target:
        return _cudnn_flops(target, it, operands), dtype
    return kernel_flops(it.custom_name, operands), dtype


def _product_flops(it: Instruction, lhs: Array, pattern: str) -> float:
    axes = [int(axis) for axis in (it.attribute(pattern) or "").replace('"', "").split(",") if axis]
    return 2.0 * math.prod(it.arrays[0].sides) * math.prod(lhs.sides[axis] for axis in axes)


def labels_of(it: Instruction) -> tuple[str, str, str]:
    """Return the names of the dimensions of a convolution's input, kernel and output."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.line)
    assert found is not None
    return found[1], found[2], found[3]


def _convolution_flops(it: Instruction, operands: list[Array]) -> float:
    """Return the FLOPs of a convolution; products with padding do not count: TPUs write matrix products so."""
    of_input, of_kernel, of_output = labels_of(it)
    sides, kernel, out = operands[0].sides, operands[1].sides, it.arrays[0].sides
    macs = out[of_output.index("b")] * out[of_output.index("f")] * kernel[of_kernel.index("i")]
    for axis in (label for label in of_output if label.isdigit()):
        places = tuple(
            x[labels.index(axis)] for x, labels in ((sides, of_input), (kernel, of_kernel), (out, of_output))
        )
        macs *= _valid_pairs(*places, *_window_of(it, int(axis)))
    return 2.0 * macs


def _window_of(it: Instruction, axis: int) -> tuple[int, int, int, int]:
    """Return (stride, low padding, dilation of the input, dilation of the kernel) along an axis of a window."""
    text = it.attribute(r"window=\{([^}]*)\}") or ""

    def value(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\d_x\-]+)", text)
        return found[1].split("x")[axis] if found else default

    return (
        int(value("stride", "1")),
        int(value("pad", "0_0").split("_")[0]),
        *(int(value(name, "1")) for name in ("lhs_dilate", "rhs_dilate")),
    )


@functools.cache
def _valid_pairs(side: int, kernel: int, out: int, stride: int, low: int, of_input: int, of_kernel: int) -> int:
    """Return the number of pairs (place of the result, place of the kernel) that meet a value of the input."""
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * of_kernel
    return int(np.sum((at >= 0) & (at < (side - 1) * of_input + 1) & (at % of_input == 0)))


def _cudnn_flops(target: str, it: Instruction, operands: list[Array]) -> float:
    """Return the FLOPs of a convolution of cuDNN, those with padding included."""
    out, kernel = it.arrays[0], operands[1]
    if "BackwardInput" in target:
        out = operands[0]
    elif "BackwardFilter" in target:
        out, kernel = operands[1], it.arrays[0]
    num_features = out.sides[labels_of(it)[2].index("f")]
    return 2.0 * math.prod(out.sides) * math.prod(kernel.sides) / num_features
