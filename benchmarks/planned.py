"""What `mvar plan --topology here` predicts beside what the devices here do: peak memory and seconds of each program.

    python benchmarks/planned.py --config configs/digits.py --tokenizer configs/digits_tokenizer.py --record

Each program of the config runs on constant weights and inputs, --rounds times. Its memory is what the allocator
reports: on a CPU its arguments and what glibc's heap grows by while it runs, elsewhere the peak of the device. That
never falls, so programs run in the order of their predicted peak. The rates behind the prediction are measured before
and after each program, and the slower ones count, since other work on the machine may change meanwhile.
Prints a table, and appends it to RESULTS.md with --record; the exit status is 1 if a training step is outside the
bounds.
"""

import argparse
import ctypes
import platform
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.stages.measure import peak_mib
from benchmarks.stages.report import Report, append_section, median
from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB
from mvar_jax.hardware.machines import HERE
from mvar_jax.planning.calibration import machine_for, measure_rates
from mvar_jax.planning.figures import compile_figures
from mvar_jax.planning.roofline import estimate
from mvar_jax.planning.tasks import make_task, programs_of
from mvar_jax.sharding import use_mesh
from mvar_jax.training.programs import TRAIN

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MOST_ERROR, MOST_RATIO = 0.05, 1.5  # of a training step's peak, and of its seconds in either direction
POLL_S = 1e-3
SETTLE_S = 0.1  # in which a CPU frees what the program before it used
# of glibc's mallinfo2; hblkhd are the bytes of large arrays, uordblks those of all others
HEAP_FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in HEAP_FIELDS]


class Heap:
    """The most bytes that this process's heap held within the `with` block beyond those at its begin."""

    def __init__(self):
        library = ctypes.CDLL(None)
        if not hasattr(library, "mallinfo2"):
            raise InputError("the memory of a CPU is measured with glibc 2.33 or newer, got another C library")
        self._info = library.mallinfo2
        self._info.restype = HeapInfo
        self.grown_bytes = 0

    def _held_bytes(self) -> int:
        info = self._info()
        return info.uordblks + info.hblkhd

    def __enter__(self) -> "Heap":
        self._begin_bytes, self._ended = self._held_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.grown_bytes = max(self.grown_bytes, self._held_bytes() - self._begin_bytes)

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()


def make(shapes):
    """Return arrays for a program's arguments: floats of one value, integers zero, keys of seed 0."""

    def one(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), x.sharding)
        value = 0.02 if jnp.issubdtype(x.dtype, jnp.floating) else 0
        # JAX's own memory: what lies in numpy's cannot be donated, and the step would make another state
        return jax.device_put(jnp.full(x.shape, value, x.dtype), x.sharding)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))


def run(task, program, argument_bytes: int, rounds: int) -> tuple[list[float | None], list[float]]:
    """Return (MiB, seconds) of some rounds; a CPU has separate ones for each, since reading a heap takes time."""
    peaks: list[float | None] = []
    seconds, on_cpu = [], jax.default_backend() == "cpu"

    def call() -> float:
        arguments = jax.block_until_ready(make(program.arguments))  # a training step takes its own away
        begin = time.perf_counter()
        jax.block_until_ready(program.jitted(*arguments))
        return time.perf_counter() - begin

    with use_mesh(task.run.mesh):
        call()  # compiles
        for _ in range(rounds):
            seconds.append(call())
            if on_cpu:
                arguments = jax.block_until_ready(make(program.arguments))
                time.sleep(SETTLE_S)
                with Heap() as heap:
                    jax.block_until_ready(program.jitted(*arguments))
                peaks.append((argument_bytes + heap.grown_bytes) / MIB)
            else:
                peaks.append(peak_mib())
    return peaks, seconds


def compare(report: Report, task, num_samples: int, rounds: int) -> bool:
    """Add a row for each program; return whether the training steps are within the bounds."""
    programs = programs_of(task, num_samples)
    pairs = sorted(((compile_figures(task, one, HERE), one) for one in programs), key=lambda pair: pair[0].peak_bytes)
    within = True
    for figures, program in pairs:
        predicted = []
        for _ in range(2):
            measure_rates.cache_clear()
            predicted.append(estimate(figures, machine_for(HERE)).total_s)
            if len(predicted) == 1:
                peaks, seconds = run(task, program, figures.argument_bytes, rounds)
        peak, predicted_s = figures.peak_bytes / MIB, max(predicted)
        error = None if None in peaks else median(peaks) / peak - 1
        ratio = median(seconds) / predicted_s
        report.add(
            "Predicted and measured",
            program=program.name,
            **{"predicted MiB": peak, "measured MiB": error if error is None else peaks},
            **{"error, %": error if error is None else 100 * error},
            **{"predicted ms": 1e3 * predicted_s, "measured ms": [1e3 * x for x in seconds], "ratio": ratio},
        )
        if program.part == TRAIN:
            within &= (error is None or abs(error) <= MOST_ERROR) and 1 / MOST_RATIO <= ratio <= MOST_RATIO
    return within


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="of a run; further options --config.KEY=VALUE change it")
    parser.add_argument("--tokenizer", help="config of the tokenizer (default: the published one)")
    parser.add_argument("--samples", type=int, default=32, help="images that the sampler draws at once (default 32)")
    parser.add_argument("--images", type=int, default=100_000, help="training images (default 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each program (default 5)")
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the table to RESULTS.md"
    )
    args, overrides = parser.parse_known_args(argv)
    report = Report()
    try:
        tokenizer = args.tokenizer and build.build_module(read_config(args.tokenizer, []))
        task = make_task(read_config(args.config, overrides), tuple(jax.devices()), args.images, tokenizer)
        within = compare(report, task, args.samples, args.rounds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.record is not None:
        kind = platform.processor() or platform.machine() if jax.default_backend() == "cpu" else ""
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} {kind}".rstrip()
        conditions = f"`{' '.join(argv)}`, jax {jax.__version__}, {devices}"
        append_section(args.record, "planned.py", conditions, report.rows)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
