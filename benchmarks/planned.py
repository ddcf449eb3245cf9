"""What `mvar plan --topology here` predicts beside what the devices here do: peak memory and seconds of each program.

    python benchmarks/planned.py --config configs/digits.py --tokenizer configs/digits_tokenizer.py --record
    python benchmarks/planned.py --config configs/imagenet256_d16.py --parts train

Each program of the config runs in a process of its own on constant weights and inputs, --rounds times, training steps
from the smallest. On an accelerator that process finds it compiled by another one: the peak never falls, and XLA's
choice among convolutions while it compiles takes more than the program. On a CPU the process compiles its program
itself, since its allocations are counted only while the program runs.
The memory is the most of any round: on a CPU the program's arguments and what every library holds at once while it
runs, as memray counts it (pip install memray), elsewhere the peak that the device's allocator reports. The rates
behind the prediction are measured once on an accelerator, by the process that compiles. On a CPU they are measured
before and after each program, and the slower ones count, since other work may change meanwhile.
Prints a row as soon as it is known, and appends the table to RESULTS.md with --record; the exit status is 1 if a
training step is outside the bounds or a program fails.
"""

import argparse
import functools
import json
import platform
import sys
import tempfile
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.accelerator import some_of
from benchmarks.stages import apart, footprint
from benchmarks.stages.report import Report, append_section, median
from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.cli.machine import OFF, use_compilation_cache
from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_json
from mvar_jax.hardware.compiling import MIB
from mvar_jax.hardware.machines import HERE
from mvar_jax.planning.calibration import machine_for, measure_rates
from mvar_jax.planning.figures import Figures, compile_figures, measure
from mvar_jax.planning.roofline import estimate
from mvar_jax.planning.tasks import bytes_on_device, make_task, programs_of
from mvar_jax.training.programs import PARTS, TRAIN, Program

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MOST_ERROR, MOST_RATIO = 0.05, 1.5  # of a training step's peak, and of its seconds in either direction
ALL = "all"  # in place of a program's name: prepare all
ANSWER = "answer.json"


def chosen(programs: list[Program], parts: list[str]) -> list[Program]:
    """Return the programs of some parts: training steps by rising work, so by rising tokens, then the others."""
    programs = [program for program in programs if program.part in parts]
    return sorted(programs, key=lambda program: (program.part != TRAIN, program.flops * (program.part == TRAIN)))


def predicted_s(figures: Figures) -> float:
    """Return the seconds that a program takes by rates that are measured now."""
    measure_rates.cache_clear()
    return estimate(figures, machine_for(HERE)).total_s


def prepare(task, programs: list[Program], config: dict) -> dict:
    """Return the device and the programs; on an accelerator compile them and add what is predicted."""
    kind = platform.processor() or platform.machine() if footprint.is_cpu() else ""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} {kind}".rstrip()
    # what a tokenizer's run does beside its steps has no images of its own
    is_step = lambda program: program.part == TRAIN and program.images > 0
    found = [{"name": one.name, "is_step": is_step(one), "is_refused": False} for one in programs]
    if not footprint.is_cpu():
        for one, figures in zip(found, measure(task, programs, HERE, config, None), strict=True):
            one |= {"is_refused": figures.is_refused, "peak_bytes": figures.peak_bytes}
            if not figures.is_refused:  # the first one measures the rates
                one["predicted_s"] = [estimate(figures, machine_for(HERE)).total_s]
    return {"device": device, "programs": found}


def measure_one(task, program: Program, rounds: int) -> dict:
    """Run a program; return its MiB and seconds, and on a CPU what is predicted."""
    if not footprint.is_cpu():  # nothing else may run here: it could be the peak
        peaks, seconds = footprint.run(task, program, bytes_on_device(program.arguments), rounds)
        return {"peaks": peaks, "seconds": seconds}
    figures = compile_figures(task, program, HERE)
    before = predicted_s(figures)
    peaks, seconds = footprint.run(task, program, figures.argument_bytes, rounds)
    predicted = {"peak_bytes": figures.peak_bytes, "predicted_s": [before, predicted_s(figures)]}
    return {"peaks": peaks, "seconds": seconds, **predicted}


def answer(args, overrides: list[str]) -> None:
    """Do the work of a child: write the answer to `args.child` into its folder."""
    use_compilation_cache(OFF if footprint.is_cpu() else str(args.folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    tokenizer = args.tokenizer and build.build_module(read_config(args.tokenizer, []))
    config = read_config(args.config, overrides)
    task = make_task(config, tuple(jax.devices()), args.images, tokenizer)
    programs = chosen(programs_of(task, args.samples), args.parts)
    if args.child == ALL:
        found = prepare(task, programs, config)
    else:
        (program,) = (program for program in programs if program.name == args.child)
        found = measure_one(task, program, args.rounds)
    write_json(args.folder / ANSWER, found)


def ask(what: str, argv: list[str], folder: Path) -> dict | None:
    """Return the answer of a child process, None if it failed: what it printed says why."""
    (folder / ANSWER).unlink(missing_ok=True)
    show = lambda line: print(line, end="", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--folder", str(folder), "--child", what]
    return None if apart.run(command, show) else json.loads((folder / ANSWER).read_text())


def add_row(report: Report, program: dict) -> bool:
    """Add the row of a program; return whether it is no training step or within the bounds."""
    peaks, seconds = program["peaks"], program["seconds"]
    peak, predicted = program["peak_bytes"] / MIB, max(program["predicted_s"])
    error = None if None in peaks else max(peaks) / peak - 1
    ratio = median(seconds) / predicted
    report.add(
        "Predicted and measured",
        program=program["name"],
        **{"predicted MiB": peak, "measured MiB": None if error is None else peaks},
        **{"error, %": None if error is None else 100 * error},
        **{"predicted ms": 1e3 * predicted, "measured ms": [1e3 * x for x in seconds], "ratio": ratio},
    )
    is_within = (error is None or abs(error) <= MOST_ERROR) and 1 / MOST_RATIO <= ratio <= MOST_RATIO
    return is_within or not program["is_step"]


def compare(report: Report, programs: list[dict], argv: list[str], folder: Path) -> bool:
    """Run each program and add its row; return whether all ran and the training steps are within the bounds."""
    is_good = True
    for program in programs:
        reason = "the compiler found it too large" if program["is_refused"] else "its process failed"
        found = None if program["is_refused"] else ask(program["name"], argv, folder)
        if found is None:
            report.add("Programs that failed", program=program["name"], reason=reason)
            is_good = False
        else:
            is_good &= add_row(report, program | found)
    return is_good


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="of a run; further options --config.KEY=VALUE change it")
    parser.add_argument("--tokenizer", help="config of the tokenizer (default: the published one)")
    parser.add_argument("--samples", type=int, default=32, help="images that the sampler draws at once (default 32)")
    parser.add_argument("--images", type=int, default=100_000, help="training images (default 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each program (default 5)")
    of_parts = functools.partial(some_of, PARTS)
    parser.add_argument(
        "--parts", type=of_parts, default=list(PARTS), help=f"some of {','.join(PARTS)} (default all)"
    )
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the table to RESULTS.md"
    )
    # in a child: the program that it runs, the folder of compiled programs, the process that started it
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, overrides = make_parser().parse_known_args(argv)
    if args.child is not None:
        if args.parent:
            apart.end_with(args.parent)
        try:
            answer(args, overrides)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    report = Report()
    # this process leaves the device to its children
    with tempfile.TemporaryDirectory() as folder:
        if (prepared := ask(ALL, argv, Path(folder))) is None:
            return 2
        try:
            is_good = compare(report, prepared["programs"], argv, Path(folder))
        finally:
            if args.record is not None:
                conditions = f"`{' '.join(argv)}`, jax {jax.__version__}, {prepared['device']}"
                append_section(args.record, "planned.py", conditions, report.rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
