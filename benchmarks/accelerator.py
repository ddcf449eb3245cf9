"""One accelerator, measured: kernels, sampling, training, the published program, kill and resume, where time goes.

    python benchmarks/accelerator.py --out out --record                     # every stage; minutes on an H100
    python benchmarks/accelerator.py --stages sampler,profile --triton_gemm both
    python benchmarks/accelerator.py --size tiny --depth 1 --batches 2 --train_batches 2    # a dry run on a CPU

Weights are random. A stage is a process of its own with a time limit; one that fails or is stopped leaves the others
running, and the exit status is then 1. It needs jax, flax, optax, orbax, ml_collections, numpy and Pillow; `resume`
also grain, `torch` and `published` torch. A time is the median of --rounds calls, with (least..most).
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.stages.report import Report, read_rows, to_markdown
from benchmarks.window_cases import TIMED_MAPS

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
DETERMINISTIC, TRITON = "--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm="


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
STAGES = {
    "kernels": Stage("operations", 60, 180, "every window backend against the float32 oracle, run twice"),
    "attention": Stage("operations", 60, 180, "ms of a loop on the device: our kernels, XLA's forms", True),
    "torch": Stage("torch_programs", 60, 150, "the same shapes: SDPA, FlexAttention", variables=WITHOUT_JAX),
    "sampler": Stage("models", 120, 300, "tokens and pixels: images/s, compiled and measured peak", True),
    "training": Stage("models", 90, 240, "a step of each phase: images/s, MFU, peak; the paper's cycle", True),
    "published": Stage("torch_programs", 60, 180, "sampling and training by --published DIR", variables=WITHOUT_JAX),
    "golden": Stage("runs", 90, 180, "numbers of the published programs at exact precision"),
    "resume": Stage("runs", 90, 200, "train, SIGKILL, resume: equal losses; sample", flags=DETERMINISTIC),
    "profile": Stage("traces", 120, 300, "kernels of sampling and training: kind, part, name, number", True),
}
PROGRAMS = ("sampler", "training")


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
    parser.add_argument("--remat", default="dots", choices=("none", "dots", "full"))
    parser.add_argument("--triton_gemm", default="off", choices=("on", "off", "both"), help="XLA's Triton products")
    parser.add_argument("--compilation_cache", default="auto", metavar="auto|off|DIR")
    parser.add_argument("--published", type=published_folder, metavar="DIR", help="a checkout of CVL-UESTC/MVAR")
    parser.add_argument("--limit_factor", type=float, default=1, help="multiply the limits, for a slower machine")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for each stage's log and accelerator.json")
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the tables to RESULTS.md"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in the process of a stage: file of its rows
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


def run_apart(name: str, triton_gemm: str, limit_s: float, argv: list[str], out: Path) -> dict:
    """Run one stage as a process, its output shown and logged; return its name, status, seconds and rows."""
    stage = STAGES[name]
    title = f"{name}, Triton products {triton_gemm}" if stage.has_products else name
    stem = f"{name}_{triton_gemm}" if stage.has_products else name
    (rows := out / f"{stem}.jsonl").unlink(missing_ok=True)
    set_by_user = os.environ.get("XLA_FLAGS")
    flags = (set_by_user, f"{TRITON}{'true' if triton_gemm == 'on' else 'false'}", stage.flags)
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONWARNINGS": "ignore::DeprecationWarning", **os.environ}
    environment |= {"XLA_FLAGS": " ".join(filter(None, flags)), "PYTHONUNBUFFERED": "1", **stage.variables}
    print(f"\n== {title}: expected {stage.seconds} s on an H100, limit {limit_s:g} s", flush=True)
    begin = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    command = [sys.executable, __file__, *argv, "--stages", name, "--rows", str(rows)]
    with (
        open(out / f"{stem}.log", "w") as log,
        # a session of its own, so that its processes can be stopped with it
        subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process,
    ):
        stop = functools.partial(os.killpg, process.pid, signal.SIGKILL)
        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
        except BaseException:  # this script is told to stop
            stop()
            raise
        finally:
            timer.cancel()
        status = process.wait()
    seconds = time.perf_counter() - begin
    print(f"== {title}: exit {status} after {seconds:.0f} s", flush=True)
    return {"stage": title, "status": status, "seconds": seconds, "rows": read_rows(rows)}


def record(results: list[dict], argv: list[str], path: Path) -> None:
    """Append the tables of a run to a file of results."""
    lines = [f"\n## {datetime.date.today()}: benchmarks/accelerator.py\n\n`{' '.join(argv)}`"]
    for result in results:
        ending = "Stopped" if result["status"] == -signal.SIGKILL else f"Exit status {result['status']}"
        ending += f" after {result['seconds']:.0f} s."
        lines.append(f"\n### {result['stage']}\n\n{ending}\n{to_markdown(result['rows'])}")
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.rows is not None:
        return run_here(args.stages[0], args)
    stages = args.stages or [name for name in STAGES if name != "published" or args.published]
    if "published" in stages and args.published is None:
        parser.error("--stages published needs --published DIR, a checkout of CVL-UESTC/MVAR")
    choices = ("off", "on") if args.triton_gemm == "both" else (args.triton_gemm,)
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        results = []
        for name in stages:
            for choice in choices if STAGES[name].has_products else choices[:1]:
                limit_s = STAGES[name].limit_s * args.limit_factor
                results.append(run_apart(name, choice, limit_s, argv, out))
                (out / "accelerator.json").write_text(json.dumps(results, indent=1))
    if args.record is not None:
        record(results, argv, args.record)
    failed = [result["stage"] for result in results if result["status"]]
    print(f"\n{len(results) - len(failed)} of {len(results)} passed" + (f"; not: {'; '.join(failed)}" * bool(failed)))
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a stage ends with it
    sys.exit(main())
