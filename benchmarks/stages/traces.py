"""The stage `profile`: what a call of a compiled program spends its time on, from a trace of the device."""

import collections
import functools
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.stages.measure import compile_all, jax_conditions, time_rounds, why
from benchmarks.stages.models import Program, sampler_programs, training_programs
from benchmarks.stages.report import CONDITIONS, Report, median

NUM_CALLS = 3  # in a trace
NUM_ROWS = 25  # of a table, the largest first
# words in the name of a kernel -> its kind; the first match wins
KINDS = (
    (r"memcpy|memset", "copies and fills of the driver"),
    (r"attention_(forward|backward)", "attention, ours"),
    (r"draw_row", "filters and draw, ours"),
    (r"sdpa|fmha|flash", "attention, cuDNN"),
    (r"fprop|dgrad|wgrad|conv2d|convolution|conv_general|winograd|implicit|cudnn", "convolutions"),
    (r"gemm_fusion|triton_gemm", "matrix products, Triton"),
    (r"gemm|gemv|cutlass|nvjet|cublas|dot_general|ynn_fusion|splitk|\bdot\b", "matrix products"),
    (r"sort|radix|cub_|topk|top_k", "sorts"),
    (r"transpose|copy|nchw|nhwc", "transposes and copies"),
    (r"reduce", "fusions that reduce"),
    (r"fusion|wrapped|loop_", "other fusions"),
)
# parts of a name that say nothing about the model
CONTROL = {"while", "body", "cond", "branch", "eval_jaxpr", "checkpoint", "rematted_computation", "closed_call"}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for words, kind in KINDS if re.search(words, kernel.lower())), "other")


def part_of(name: str) -> str:
    """Return the part of the model that made an instruction, from XLA's name of it.

    "jit(step)/transpose(jvp(Transformer))/while/body/blocks/ffn/up/rd,rf->df/dot_general" becomes "backward:
    Transformer blocks ffn up"; without a module, the primitive's name is left.
    """
    *scopes, primitive = name.split("/")
    words = [re.sub(r"\b(?:jvp|vmap|transpose)\(|\)+$", "", scope).rpartition(".")[2] for scope in scopes]
    words = [word for word in words if re.fullmatch(r"\w+", word) and word not in CONTROL]
    direction = "backward: " if "transpose(" in name else ""
    return direction + (" ".join(dict.fromkeys(words)) or f"({primitive})")


def parts_by_instruction(text: str) -> dict[str, str]:
    """Return instruction -> part of the model, from a compiled program's text. Kernels have "_" for "." and "-"."""
    named = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    return {re.sub(r"[.\-]", "_", instruction): part_of(name) for instruction, name in named}


def device_events(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Yield (kernel, XLA's instruction, milliseconds) of everything a trace says that the device did."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    is_device = any(plane.name.startswith("/device:") for plane in planes)
    for plane in planes:
        if is_device and not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            # a GPU's lines are its streams; a TPU's has lines of steps and modules too
            if is_device and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                instruction = str(dict(event.stats).get("hlo_op", ""))
                # a CPU's loop is an event, as are the instructions in it
                if is_device or (instruction and not re.match(r"while|call|conditional", instruction)):
                    yield event.name, instruction, event.duration_ns / 1e6


def trace(program: Program, compiled, folder: Path) -> list[tuple[str, str, float]]:
    """Record NUM_CALLS calls; return `device_events`."""
    with jax.profiler.trace(str(folder)):
        for _ in range(NUM_CALLS):
            jax.block_until_ready(program.call(compiled))
    with warnings.catch_warnings():
        # jax's own types of a trace have no module name
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        return list(device_events(folder))


def add_groups(table: str, column: str, groups: dict[str, list[float]], report: Report) -> None:
    """Add the largest groups of milliseconds, with their shares."""
    total = sum(map(sum, groups.values()))
    for name, times in sorted(groups.items(), key=lambda item: -sum(item[1]))[:NUM_ROWS]:
        cells = {column: name, "ms": sum(times) / NUM_CALLS, "share": sum(times) / total}
        report.add(table, **cells, kernels=round(len(times) / NUM_CALLS))


def add_profile(title: str, program: Program, compiled, folder: Path, rounds: int, report: Report) -> None:
    """Add tables of one program: kernels by kind, by part of the model and by name."""
    wall = time_rounds(functools.partial(program.call, compiled), rounds)
    events, parts = trace(program, compiled, folder), parts_by_instruction(compiled.as_text())
    by_kind, by_part, by_name = (collections.defaultdict(list) for _ in range(3))
    for kernel, instruction, ms in events:
        kind, own = kind_of(kernel), [re.sub(r"[.\-]", "_", name) for name in (instruction, kernel)]
        part = next((parts[name] for name in own if name in parts), f"(no name) {kind}")
        by_kind[kind].append(ms)
        by_part[part].append(ms)
        by_name[re.sub(r"[._]\d+\b", "", kernel)[:90].replace("|", "/")].append(ms)
    busy = sum(map(sum, by_kind.values())) / NUM_CALLS
    cells = {"program": title, "ms without trace": wall, "ms of kernels": busy, "busy": busy / median(wall)}
    report.add("programs", **cells, **{"kernels a call": round(len(events) / NUM_CALLS)})
    add_groups(f"{title}: by kind", "kind", by_kind, report)
    add_groups(f"{title}: by part", "part", by_part, report)
    add_groups(f"{title}: by kernel", "kernel", by_name, report)


def run_profile(args, report: Report) -> bool:
    """Trace sampling to pixels at each of --profile_batches, and the first training batch's phases."""
    report.add(CONDITIONS, **jax_conditions())
    programs = sampler_programs(args, args.profile_batches, ["pixels"]) if "sampler" in args.profile else {}
    programs |= training_programs(args, args.train_batches[:1]) if "training" in args.profile else {}
    compiled, _ = compile_all({name: program.lower for name, program in programs.items()})
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, program) in enumerate(programs.items()):
            try:
                if isinstance(built := compiled[name], Exception):
                    raise built
                add_profile(name, program, built, Path(folder) / str(number), args.rounds, report)
            except Exception as error:  # one that does not run leaves the others
                report.add("profiles that failed", program=name, reason=why(error))
                is_good = False
    return is_good
