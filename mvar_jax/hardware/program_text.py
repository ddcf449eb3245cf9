"""The text of a compiled program: its instructions, and the bytes that each reads and writes.

XLA's own figures count a loop's body once and custom kernels as nothing; here a body counts as often as it runs. A
fusion that only slices, gathers or updates part of an operand counts that part.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# instructions without a kernel of their own
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
PARTS = {"dynamic-slice", "slice", "gather"}  # they read as much as they return
# which array of an asynchronous copy's type is its result; the others are its operand and a mark
RESULT_OF = {"copy-start": 0, "slice-start": 1}
SAME_PLACES = {"bitcast", "convert"}  # a part of what they return is read from a part of their operand
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
FAST_MEMORY = "S(1)"  # in a layout: an array that a TPU keeps beside its cores


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: dtype as XLA writes it, sides, and whether it lies in a TPU's fast memory."""

    dtype: str
    sides: tuple[int, ...]
    width: int
    is_fast: bool = False

    @property
    def size(self) -> int:
        """Return the bytes in the device's main memory; workspace (s8) is not counted."""
        return 0 if self.is_fast or self.dtype == "s8" else self.width * math.prod(self.sides)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program: what it is, its operands by name, and the arrays of its result."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    line: str

    @property
    def results(self) -> tuple[Array, ...]:
        """Return the arrays that it writes."""
        return (self.arrays[RESULT_OF[self.op]],) if self.op in RESULT_OF else self.arrays

    @functools.cached_property
    def size(self) -> int:
        """Return the bytes of the result."""
        return sum(array.size for array in self.results)

    @property
    def allocates(self) -> bool:
        """Return whether it only reserves memory, which no kernel writes."""
        return 'custom_call_target="AllocateBuffer"' in self.line

    @property
    def is_root(self) -> bool:
        """Return whether it is the result of its computation."""
        return self.line.lstrip().startswith("ROOT")

    def attribute(self, pattern: str) -> str | None:
        """Return the group of a pattern that the line matches, None if it does not."""
        found = re.search(pattern, self.line)
        return found and found[1]

    @property
    def called(self) -> str | None:
        """Return the computation of a fusion or of an asynchronous instruction."""
        return self.attribute(r"calls=%?([\w.\-]+)")

    @property
    def kernel_name(self) -> str:
        """Return where a kernel comes from: the name of a custom call, or of the operation it was made for."""
        name = self.attribute(r'custom_call_target="([^"]+)"') or self.attribute(r'op_name="([^"]+)"') or self.op
        return self.attribute(r'op_name="([^"]+)"') or name if name.endswith("triton") else name

    @property
    def custom_name(self) -> str:
        """Return the name that a custom kernel was given, "" if it has none."""
        if 'custom_call_target="tpu_custom_call"' in self.line:
            return self.name
        return self.attribute(r'\bname = "([^"]+)"') or self.attribute(r"kernel_name[^\w]+(\w+)") or ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs, how often, and the computation around it."""

    instruction: Instruction
    times: int
    around: Computation


@dataclasses.dataclass(frozen=True)
class Text:
    """A compiled program: computations by name, and the name of the entry."""

    entry: str
    computations: dict[str, Computation]

    def steps(self) -> Iterator[Step]:
        """Yield what runs: the instructions of the entry, of calls and, with their trip count, of loops."""
        return self._visit(self.entry, 1)

    def _visit(self, name: str, times: int) -> Iterator[Step]:
        around = self.computations[name]
        for it in around.values():
            if it.op == "while":
                yield from self._visit(it.attribute(r"body=%?([\w.\-]+)") or "", times * self._trips(it))
            elif it.op == "call":
                yield from self._visit(it.attribute(r"to_apply=%?([\w.\-]+)") or "", times)
            elif it.op == "conditional":  # one branch runs: the first is counted
                branch = it.attribute(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)")
                yield from self._visit(branch or "", times)
            elif it.op == "async-start":
                yield from self._visit(it.called or "", times)
            elif it.op not in FREE and not it.allocates and not it.op.endswith(("-done", "-update")):
                yield Step(it, times, around)

    def _trips(self, loop: Instruction) -> int:
        """Return how often a loop runs; the largest number that its condition compares with if XLA does not say."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        limits = [it.attribute(r"constant\((\d+)\)") for it in condition.values() if it.op == "constant"]
        return max((int(limit) for limit in limits if limit), default=1)

    def fused(self, it: Instruction) -> Computation:
        """Return the computation that a fusion calls; nothing for another instruction."""
        return self.computations.get(it.called or "", {})

    def traffic(self, step: Step) -> int:
        """Return the bytes that one run of an instruction reads and writes."""
        it = step.instruction
        sizes = [step.around[name].size for name in it.operands if name in step.around]
        if fused := self.fused(it):
            return sum(self._read_bytes(fused, i, size) for i, size in enumerate(sizes)) + self._written_bytes(fused)
        if it.op in PARTS:
            return 2 * it.size
        if it.op == "slice-start":  # a TPU reads a part ahead, into its fast memory
            (part,) = it.results
            read = dataclasses.replace(part, is_fast=sizes[0] == 0)
            return read.size + it.size
        if it.op == "dynamic-update-slice":
            return 2 * sizes[1]
        return sum(sizes) + it.size

    def _read_bytes(self, fused: Computation, place: int, size: int) -> int:
        """Return how many bytes of a fusion's operand it reads: all, unless only parts are used."""
        (name,) = (name for name, it in fused.items() if it.op == "parameter" and f"parameter({place})" in it.line)
        names, read = {name}, 0
        for other, it in fused.items():
            uses = [i for i, operand in enumerate(it.operands) if operand in names]
            if not uses:
                continue
            if it.op in SAME_PLACES:
                names.add(other)
            elif it.op in PARTS and uses[0] == 0:
                read += it.size // it.arrays[0].width * fused[name].arrays[0].width
            elif it.op == "dynamic-update-slice" and uses[0] == 0:
                pass  # the rest of the array stays where it is
            elif inner := self.fused(it):  # TPUs have fusions within fusions
                read += sum(self._read_bytes(inner, i, size) for i in uses)
            else:
                return size
        return size if any(fused[name].is_root for name in names) else min(read, size)

    def _written_bytes(self, fused: Computation) -> int:
        """Return how many bytes a fusion writes: its results, or what it updates of arrays in place."""
        (root,) = (it for it in fused.values() if it.is_root)
        if root.op == "tuple":
            return sum(self._result_bytes(fused, fused[name]) for name in root.operands)
        updates = [it for it in fused.values() if it.op == "dynamic-update-slice" and it.size >= root.size]
        return self._result_bytes(fused, updates[0] if updates else root)

    def _result_bytes(self, fused: Computation, result: Instruction) -> int:
        it = result
        while it.op == "bitcast":
            it = fused[it.operands[0]]
        if it.op == "dynamic-update-slice":
            return min(result.size, fused[it.operands[1]].size)
        return min(result.size, self._written_bytes(inner)) if (inner := self.fused(it)) else result.size


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how often it is launched."""

    name: str
    launches: int
    num_bytes: int


def kernels_of(text: str) -> list[Kernel]:
    """Return the kernels of a compiled program, those in loops with the loop's trip count."""
    program = parse(text)
    return [
        Kernel(step.instruction.kernel_name, step.times, step.times * program.traffic(step))
        for step in program.steps()
    ]


def arrays_of(kind: str) -> tuple[Array, ...]:
    """Return the arrays of a type such as `(f32[2,3]{1,0}, s32[])`."""
    found = []
    for dtype, bits, sides, layout in ARRAY.findall(kind):
        width = 1 if dtype == "pred" else math.ceil(int(bits) / 8)
        found.append(
            Array(dtype, tuple(int(side) for side in sides.split(",") if side), width, FAST_MEMORY in layout)
        )
    return tuple(found)


def _close(text: str, begin: int) -> int:
    """Return the place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis in {text[begin : begin + 80]}")


def _whole_lines(text: str) -> Iterator[str]:
    """Yield the lines of a program; attributes of a Pallas kernel continue in lines that are not indented."""
    whole = ""
    for line in text.splitlines():
        if (
            whole.startswith(" ")
            and line
            and not line.startswith((" ", "%", "ENTRY"))
            and not re.match(r"\}(,|$)", line)
        ):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def parse(text: str) -> Text:
    """Return the computations of a compiled program."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            rest = found[2]
            end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
            op = rest[end:].lstrip().partition("(")[0]
            begin = rest.index("(", end)
            operands = re.findall(r"%([\w.\-]+)", rest[begin : _close(rest, begin)])
            current[found[1]] = Instruction(found[1], op, arrays_of(rest[:end]), tuple(operands), line)
        elif line.startswith("}"):
            current = None
    return Text(entry, computations)
