"""Kernels that a compiled sampler launches on a GPU, and the bytes that they read and write.

    python benchmarks/launches.py --target h100 --depth 16 --batch 32    # no device needed, but jax[cuda12]

XLA's own figures count a loop's body once and custom kernels as nothing. This counts in the compiled text: the body
times its trip count, and for each kernel its operands and results once. A fusion that only slices, gathers or updates
part of an operand counts that part.
"""

import argparse
import collections
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import compile_sampler, make_modules

from mvar_jax.errors import InputError
from mvar_jax.scales import KNOWN_SIDES

# instructions without a kernel of their own
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
PARTS = {"dynamic-slice", "slice", "gather"}  # they read as much as they return
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program: what it is, its operands by name, and the bytes of its result."""

    op: str
    size: int
    operands: tuple[str, ...]
    line: str

    @property
    def is_root(self) -> bool:
        return self.line.lstrip().startswith("ROOT")

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.line)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how often it is launched."""

    name: str
    launches: int
    num_bytes: int


def size_of(shapes: str) -> int:
    """Return the bytes of the arrays in a type such as `(f32[2,3]{1,0}, s32[])`; workspace (s8) is not counted."""
    total = 0
    for kind, bits, sides in ARRAY.findall(shapes):
        width = 1 if kind == "pred" else math.ceil(int(bits) / 8)
        total += 0 if kind == "s8" else width * math.prod(int(side) for side in sides.split(",") if side)
    return total


def close(text: str, begin: int) -> int:
    """Return the place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis in {text[begin : begin + 80]}")


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """Return (name of the entry, computation -> name -> Instruction) of a compiled program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            rest = found[2]
            end = close(rest, 0) if rest.startswith("(") else rest.index(" ")
            op = rest[end:].lstrip().partition("(")[0]
            begin = rest.index("(", end)
            operands = re.findall(r"%([\w.\-]+)", rest[begin : close(rest, begin)])
            current[found[1]] = Instruction(op, size_of(rest[:end]), tuple(operands), line)
        elif line.startswith("}"):
            current = None
    return entry, computations


def read_bytes(place: int, size: int, fused: dict[str, Instruction]) -> int:
    """Return how many bytes of a fusion's operand it reads: all, unless only parts are used."""
    (name,) = (name for name, it in fused.items() if it.op == "parameter" and f"parameter({place})" in it.line)
    names, read = {name}, 0
    for other, it in fused.items():
        if not names & set(it.operands):
            continue
        if it.op == "bitcast":
            names.add(other)
        elif it.op in PARTS and it.operands[0] in names:
            read += it.size
        elif it.op == "dynamic-update-slice" and it.operands[0] in names:
            pass  # the rest of the array stays where it is
        else:
            return size
    return min(read, size)


def written_bytes(fused: dict[str, Instruction]) -> int:
    """Return how many bytes a fusion writes: its result, or what it updates of an array in place."""
    (root,) = (it for it in fused.values() if it.is_root)
    for it in fused.values():
        if it.op == "dynamic-update-slice" and it.size >= root.size:
            return fused[it.operands[1]].size
    return root.size


def traffic(it: Instruction, around: dict[str, Instruction], computations) -> int:
    """Return the bytes that one launch reads and writes."""
    sizes = [around[name].size for name in it.operands]
    if fused := computations.get(it.attribute(r"calls=%?([\w.\-]+)")):
        reads = sum(read_bytes(place, size, fused) for place, size in enumerate(sizes))
        return reads + written_bytes(fused)
    if it.op in PARTS:
        return 2 * it.size
    return sum(sizes) + it.size


def kernels_of(text: str) -> list[Kernel]:
    """Return the kernels of a compiled program, those in loops with the loop's trip count."""
    entry, computations = parse(text)
    found: list[Kernel] = []

    def visit(computation: str, times: int) -> None:
        around = computations[computation]
        for it in around.values():
            if it.op == "while":
                body = it.attribute(r"body=%?([\w.\-]+)")
                visit(body, times * int(it.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1))
            elif it.op == "call":
                visit(it.attribute(r"to_apply=%?([\w.\-]+)"), times)
            elif it.op not in FREE and not it.op.endswith("-done"):
                name = it.attribute(r'custom_call_target="([^"]+)"') or it.attribute(r'op_name="([^"]+)"') or it.op
                if name.endswith("triton"):
                    name = it.attribute(r'op_name="([^"]+)"') or name
                found.append(Kernel(name, times, times * traffic(it, around, computations)))

    visit(entry, 1)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100", help="a GPU that need not be here")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, choices=sorted(KNOWN_SIDES), help="image side")
    parser.add_argument("--batch", type=int, default=32, help="images; guidance doubles the rows")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the computation")
    parser.add_argument("--output", default="pixels", help="pixels, or ids without the decoder")
    parser.add_argument("--backend", default="auto", help="backend of the local window")
    parser.add_argument("--top", type=int, default=15, help="kernels to list, by bytes and by launches")
    parser.add_argument("--text", type=Path, help="count in this compiled text, or write it if the file is missing")
    args = parser.parse_args(argv)
    if args.text is not None and args.text.exists():
        text = args.text.read_text()
    else:
        try:
            dtype = jnp.dtype(args.dtype)
            modules = make_modules(args, "markov")
            text = compile_sampler(args.target, modules, args.batch, dtype, (args.output,)).text
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if args.text is not None:
            args.text.write_text(text)
    report(kernels_of(text), args.top)
    return 0


def report(kernels: list[Kernel], num_listed: int) -> None:
    """Print the sums, and the kernels with the same origin that launch and move most."""
    launches, num_bytes = collections.Counter(), collections.Counter()
    for kernel in kernels:
        name = re.sub(r"\d+", "#", kernel.name)[-80:]
        launches[name] += kernel.launches
        num_bytes[name] += kernel.num_bytes
    total = functools.reduce(lambda a, b: a + b, num_bytes.values(), 0)
    print(f"{sum(launches.values())} kernels launched, {total / 1e9:.2f} GB read and written")
    for title, counts in (("launches", launches), ("bytes", num_bytes)):
        print(f"\n| origin | launches | GB | most {title} first\n| --- | --- | --- |")
        for name, _ in counts.most_common(num_listed):
            print(f"| {name} | {launches[name]} | {num_bytes[name] / 1e9:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
