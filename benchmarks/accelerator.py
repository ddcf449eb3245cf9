"""One accelerator, measured: kernels, sampling, training, the published program, kill and resume, where time goes.

    python benchmarks/accelerator.py --out out --record                     # every stage; minutes on an H100
    python benchmarks/accelerator.py --stages sampler,profile --triton_gemm both
    python benchmarks/accelerator.py --out out --total_s 540                # a device for some minutes
    python benchmarks/accelerator.py --size tiny --depth 1 --batches 2 --train_batches 2    # a dry run on a CPU

Weights are random. A stage is a process of its own with a time limit; one that fails or is stopped leaves the others
running, and the exit status is then 1, as if one was not run for lack of time. Rows and output are written as they
come, all stages to one file each; --record also has what is there when this script is told to stop. It needs jax,
flax, optax, orbax, ml_collections, numpy and Pillow; `resume` also grain, `torch` and `published` torch. A time is
the median of --rounds calls, with (least..most).
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.stages import apart
from benchmarks.stages.report import Report, read_rows, to_markdown
from benchmarks.window_cases import TIMED_MAPS

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
DETERMINISTIC, TRITON = "--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm="
ROWS, LOG = "rows.jsonl", "log.txt"  # of all stages, each part below the stage's name
NOT_RUN, STOPPED = None, -signal.SIGKILL  # in place of a stage's exit status


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: the function run_NAME of a module of benchmarks/stages.

    seconds: expected on an H100. limit_s: it is stopped after that. has_products: runs once for each choice of
    --triton_gemm. flags: more of XLA's. variables: more of its environment.
    """

    module: str
    seconds: int
    limit_s: int
    what: str
    has_products: bool = False
    flags: str = ""
    variables: dict = dataclasses.field(default_factory=dict)


WITHOUT_JAX = {"JAX_PLATFORMS": "cpu"}  # jax would take most of the device's memory from torch
# in the order of a run: what is cheap to check, what is missed most, what takes long to start
STAGES = {
    "kernels": Stage("operations", 60, 180, "every window backend against the float32 oracle, run twice"),
    "golden": Stage("runs", 90, 180, "numbers of the published programs at exact precision"),
    "sampler": Stage("models", 120, 300, "tokens and pixels: images/s, compiled memory", True),
    "training": Stage(
        "models", 90, 240, "a step of each phase: images/s, MFU, compiled memory; the paper's cycle", True
    ),
    "attention": Stage("operations", 60, 180, "ms of a loop on the device: our kernels, XLA's forms", True),
    "torch": Stage("torch_programs", 60, 150, "the same shapes: SDPA, FlexAttention", variables=WITHOUT_JAX),
    "profile": Stage("traces", 120, 300, "kernels of sampling and training: kind, part, name, number", True),
    "resume": Stage("runs", 90, 200, "train, SIGKILL, resume: equal losses; sample", flags=DETERMINISTIC),
    "published": Stage("torch_programs", 60, 180, "sampling and training by --published DIR", variables=WITHOUT_JAX),
}
PROGRAMS = ("sampler", "training")
REMATS = ("none", "dots", "full")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def maps(text: str) -> list[int]:
    return [int(side) for side in some_of([str(side) for side in TIMED_MAPS], text)]


def some_of(allowed, text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in allowed]:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(allowed)}, got {unknown[0]}")
    return names


def loops(text: str) -> list[tuple[str, int]]:
    """Return pairs of remat and blocks in an iteration of the loop over blocks."""
    pairs = [part.partition(":") for part in text.split(",")]
    if missing := [remat for remat, colon, _ in pairs if not colon]:
        raise argparse.ArgumentTypeError(f"must be pairs REMAT:BLOCKS such as dots:1, got {missing[0]}")
    return [(some_of(REMATS, remat)[0], count(blocks)) for remat, _, blocks in pairs]


def published_folder(text: str) -> Path:
    if not (Path(text) / "models" / "mvar.py").is_file():
        raise argparse.ArgumentTypeError(f"must be a checkout of CVL-UESTC/MVAR with models/mvar.py, got {text}")
    return Path(text)


def make_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:10} {x.seconds:4} s (limit {x.limit_s}): {x.what}" for name, x in STAGES.items())
    epilog = f"stages, seconds expected on an H100 with nothing in the cache of compiled programs:\n{listed}"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=raw)
    stages, programs = (functools.partial(some_of, names) for names in (STAGES, PROGRAMS))
    parser.add_argument("--stages", type=stages, help="comma-separated (default all; published needs --published)")
    parser.add_argument("--size", default="256", choices=("256", "512", "1024", "tiny"), help="image side")
    parser.add_argument("--depth", type=count, default=16)
    parser.add_argument("--batches", type=counts, default=[1, 32, 64, 256], help="of sampling")
    parser.add_argument("--train_batches", type=counts, default=[32, 56])
    parser.add_argument("--maps", type=maps, default=list(TIMED_MAPS), help="sides in `attention` and `torch`")
    parser.add_argument("--profile", type=programs, default=list(PROGRAMS), help="programs that `profile` traces")
    parser.add_argument("--profile_batches", type=counts, default=[1, 64], help="of sampling in `profile`")
    parser.add_argument("--rounds", type=count, default=7, help="timed calls of each program, after a first one")
    parser.add_argument("--backend", default="auto", help="of the local window in sampling and training")
    words = "of training: remat and blocks in an iteration; dots:1,none:16 compares the default with no loop in d16"
    parser.add_argument("--loops", type=loops, default=[("dots", 1)], metavar="REMAT:BLOCKS,...", help=words)
    parser.add_argument("--triton_gemm", default="off", choices=("on", "off", "both"), help="XLA's Triton products")
    parser.add_argument("--compilation_cache", default="auto", metavar="auto|off|DIR")
    parser.add_argument("--published", type=published_folder, metavar="DIR", help="a checkout of CVL-UESTC/MVAR")
    parser.add_argument("--limit_factor", type=float, default=1, help="multiply the limits, for a slower machine")
    parser.add_argument(
        "--total_s", type=float, default=math.inf, help="seconds for all stages; one that no longer fits is not run"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for rows.jsonl, log.txt and accelerator.json")
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the tables to RESULTS.md"
    )
    # in the process of a stage: file of its rows, number of the process that started it
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def run_here(name: str, args) -> int:
    """Run one stage in this process; return its exit status, 1 if it missed a limit."""
    from mvar_jax.cli.machine import use_compilation_cache
    from mvar_jax.errors import InputError

    use_compilation_cache(args.compilation_cache)
    stage = getattr(importlib.import_module(f"benchmarks.stages.{STAGES[name].module}"), f"run_{name}")
    try:
        return 0 if stage(args, Report(args.rows)) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_apart(name: str, triton_gemm: str, limit_s: float, argv: list[str], out: Path, result: dict) -> None:
    """Run one stage as a process, its output shown and logged; put its status, seconds and rows into `result`."""
    stage, title = STAGES[name], result["stage"]
    set_by_user = os.environ.get("XLA_FLAGS")
    flags = (set_by_user, f"{TRITON}{'true' if triton_gemm == 'on' else 'false'}", stage.flags)
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONWARNINGS": "ignore::DeprecationWarning", **os.environ}
    environment |= {"XLA_FLAGS": " ".join(filter(None, flags)), "PYTHONUNBUFFERED": "1", **stage.variables}
    with open(out / ROWS, "a") as rows:
        rows.write(json.dumps({"stage": title}) + "\n")
        first = rows.tell()
    command = [sys.executable, __file__, *argv, "--stages", name, "--rows", str(out / ROWS)]
    with open(out / LOG, "a", buffering=1) as log:

        def show(line: str) -> None:
            print(line, end="", flush=True)
            log.write(line)

        show(f"\n== {title}: expected {stage.seconds} s on an H100, limit {limit_s:.0f} s\n")
        begin = time.monotonic()
        result["status"] = STOPPED  # if this process is told to stop, and the stage with it
        try:
            result["status"] = apart.run(command, show, limit_s, environment)
        finally:
            result |= {"seconds": time.monotonic() - begin, "rows": read_rows(out / ROWS, first)}
            show(f"== {title}: exit {result['status']} after {result['seconds']:.0f} s\n")


def run_stages(stages: list[str], args, argv: list[str], out: Path, results: list[dict]) -> None:
    """Run stages one after the other; append the result of each to `results`, and write them after each.

    A stage is not run if less than its expected seconds are left of --total_s; a shorter one after it may be.
    """
    end = time.monotonic() + args.total_s
    choices = ("off", "on") if args.triton_gemm == "both" else (args.triton_gemm,)
    for name in stages:
        stage = STAGES[name]
        for choice in choices if stage.has_products else choices[:1]:
            title = f"{name}, Triton products {choice}" if stage.has_products else name
            results.append(result := {"stage": title, "status": NOT_RUN, "seconds": 0.0, "rows": []})
            left_s = end - time.monotonic()
            try:
                if left_s < stage.seconds:
                    print(f"\n== {title}: not run, {left_s:.0f} s are left of {stage.seconds} expected", flush=True)
                else:
                    run_apart(name, choice, min(stage.limit_s * args.limit_factor, left_s), argv, out, result)
            finally:
                (out / "accelerator.json").write_text(json.dumps(results, indent=1))


def record(results: list[dict], argv: list[str], path: Path) -> None:
    """Append the tables of a run to a file of results."""
    lines = [f"\n## {datetime.date.today()}: benchmarks/accelerator.py\n\n`{' '.join(argv)}`"]
    endings = {STOPPED: "Stopped", NOT_RUN: "Not run: too little of --total_s was left"}
    for result in results:
        ending = endings.get(result["status"], f"Exit status {result['status']}")
        ending += f" after {result['seconds']:.0f} s." if result["status"] != NOT_RUN else "."
        lines.append(f"\n### {result['stage']}\n\n{ending}\n{to_markdown(result['rows'])}")
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")


def summarize(results: list[dict]) -> int:
    """Print which stages passed; return the exit status."""
    missed = [result["stage"] for result in results if result["status"] == NOT_RUN]
    failed = [result["stage"] for result in results if result["status"] not in (0, NOT_RUN)]
    words = f"{len(results) - len(failed) - len(missed)} of {len(results)} passed"
    words += f"; not: {'; '.join(failed)}" * bool(failed) + f"; not run: {'; '.join(missed)}" * bool(missed)
    print(f"\n{words}")
    return 1 if failed or missed else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.rows is not None:
        if args.parent:
            apart.end_with(args.parent)
        return run_here(args.stages[0], args)
    stages = args.stages or [name for name in STAGES if name != "published" or args.published]
    if "published" in stages and args.published is None:
        parser.error("--stages published needs --published DIR, a checkout of CVL-UESTC/MVAR")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for name in (ROWS, LOG):
            (out / name).unlink(missing_ok=True)
        try:
            run_stages(stages, args, argv, out, results)
        finally:  # also if it is told to stop
            if args.record is not None:
                record(results, argv, args.record)
    return summarize(results)


def start() -> int:
    """Run `main`; SIGTERM ends it, the stage that runs and what that started, and leaves their results."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return main()


if __name__ == "__main__":
    sys.exit(start())
