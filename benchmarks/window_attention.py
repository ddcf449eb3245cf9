"""All backends of local-window attention in one run: time on this machine, memory here and on other targets.

    python benchmarks/window_attention.py --out out                        # this machine
    python benchmarks/window_attention.py --targets h100,v5e --no_run      # compiled figures, no device needed

Prints a table for each map, writes window_attention.csv and window_attention.png. Times are medians of interleaved
runs of the compiled forward pass and of forward plus the three gradients. Memory is XLA's figure of temporaries.
"""

import argparse
import csv
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.window_cases import BENCHMARK_SIDES, Case, benchmark_case
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB, compile_for
from mvar_jax.hardware.machines import HERE, machine_of, platform_of
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.window import BACKENDS, choose_backend, local_window_attention, why_not

DIRECTIONS = ("forward", "backward")
FIELDS = ("target", "map", "backend", "is_default", "forward_ms", "backward_ms", "forward_mib", "backward_mib")


def forward(backend: str, window: int, q, k, v, cotangent):
    return local_window_attention(q, k, v, window, backend=backend)


def backward(backend: str, window: int, q, k, v, cotangent):
    """Return the output and all three gradients."""
    out, pull_back = jax.vjp(lambda q, k, v: forward(backend, window, q, k, v, None), q, k, v)
    return out, *pull_back(cotangent)


def shapes_of(case: Case) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(case.shape, jnp.dtype(case.dtype))] * 4


def backends_for(case: Case, target: str) -> list[str]:
    with compiling_for(platform_of(target)):
        return [name for name in BACKENDS if not why_not(name, shapes_of(case)[0])]


def default_for(case: Case, target: str) -> str:
    with compiling_for(platform_of(target)):
        return choose_backend(shapes_of(case)[0], case.window)


def median_ms(programs: dict, seconds: float) -> dict:
    """Return the median milliseconds of each call; runs are interleaved, so that a slow moment affects all."""
    times = {key: [] for key in programs}
    while any(len(t) < 5 or (sum(t) < seconds and len(t) < 200) for t in times.values()):
        for key, run in programs.items():
            if len(times[key]) >= 5 and sum(times[key]) >= seconds:
                continue
            # an untimed run first: after a run that freed gigabytes, the next one takes up to three times as long
            jax.block_until_ready(run())
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[key].append(time.perf_counter() - begin)
    return {key: 1e3 * statistics.median(t) for key, t in times.items()}


def calls_of(case: Case, backends: list[str]) -> dict:
    """Return, by (backend, direction), a call of the compiled program on random arrays."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=case.shape), jnp.dtype(case.dtype)) for _ in range(4)]
    pairs = [(name, direction) for name in backends for direction in DIRECTIONS]
    programs = {pair: jax.jit(functools.partial(globals()[pair[1]], pair[0], case.window)) for pair in pairs}
    return {pair: functools.partial(program, *arrays) for pair, program in programs.items()}


def bound_ms(target: str, compiled) -> float | None:
    """Return the least milliseconds by the target's FLOP/s and bandwidth for the work that XLA counts."""
    if compiled.flops is None or not compiled.bytes_accessed:
        return None
    machine = machine_of(target)
    return 1e3 * max(compiled.flops / machine.peak("bfloat16"), compiled.bytes_accessed / machine.memory_bandwidth)


def rows_of(case: Case, target: str, backends: list[str], seconds: float | None) -> list[dict]:
    """Return one row per backend. seconds: time spent on each program; None compiles only."""
    times = median_ms(calls_of(case, backends), seconds) if target == HERE and seconds is not None else {}
    rows = []
    for name in backends:
        row = {"target": target, "map": case.height, "backend": name, "is_default": name == default_for(case, target)}
        for direction in DIRECTIONS:
            program = functools.partial(globals()[direction], name, case.window)
            compiled = compile_for(target, program, *shapes_of(case))
            row[f"{direction}_mib"] = compiled.temp_bytes / MIB
            is_opaque = name.startswith("pallas")  # XLA counts a kernel as zero
            bound = None if target == HERE or is_opaque else bound_ms(target, compiled)
            row[f"{direction}_ms"] = times.get((name, direction), bound)
        rows.append(row)
    return rows


def print_rows(case: Case, target: str, rows: list[dict]) -> None:
    title = "measured" if target == HERE else "least time by roofline"
    print(f"\n{target}, {case}, batch {case.batch}, {title}")
    print("| backend | forward ms | backward ms | forward temp MiB | backward temp MiB |")
    print("| --- | --- | --- | --- | --- |")
    best = {d: min((r[d] for r in rows if r[d] is not None), default=None) for d in ("forward_ms", "backward_ms")}
    for row in rows:
        cells = [f"**{row['backend']}**" if row["is_default"] else row["backend"]]
        for name in ("forward_ms", "backward_ms"):
            value = row[name]
            cells.append("" if value is None else f"{value:.3g} ({value / best[name]:.2f}x)")
        cells += [f"{row[f'{direction}_mib']:.1f}" for direction in DIRECTIONS]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_growth(small: Case, large: Case, seconds: float) -> None:
    """Print the time of `auto` on a map of twice the side over the smaller one, run alternately."""
    calls = {(case, key[1]): call for case in (small, large) for key, call in calls_of(case, ["auto"]).items()}
    times = median_ms(calls, seconds)
    ratios = [f"{direction} {times[large, direction] / times[small, direction]:.2f}x" for direction in DIRECTIONS]
    print(f"{small} to {large}, four times the queries: auto {', '.join(ratios)}", flush=True)


def draw_figure(rows: list[dict], path: Path) -> None:
    """Plot time and temporaries against the map's side, one line per backend, one row of axes per target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets = list(dict.fromkeys(row["target"] for row in rows))
    columns = [("forward_ms", "forward, ms"), ("backward_ms", "forward + backward, ms"), ("backward_mib", "temp MiB")]
    figure, axes = plt.subplots(len(targets), 3, figsize=(13, 4 * len(targets)), squeeze=False)
    for target, line in zip(targets, axes, strict=True):
        for (name, label), axis in zip(columns, line, strict=True):
            for backend in BACKENDS:
                points = [r for r in rows if (r["target"], r["backend"]) == (target, backend) and r[name] is not None]
                if points:
                    axis.plot([r["map"] for r in points], [max(r[name], 1e-3) for r in points], "o-", label=backend)
            axis.set(xscale="log", yscale="log", xlabel="side of the map", ylabel=label, title=target)
            axis.set_xticks(BENCHMARK_SIDES, BENCHMARK_SIDES)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(map(str, BENCHMARK_SIDES)), help="sides of square maps")
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2, help="batch of the measured runs")
    parser.add_argument("--dtype", default="float32", help="dtype of the measured runs")
    parser.add_argument("--backends", default="", help="comma-separated (default all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each program")
    parser.add_argument("--targets", default="", help="comma-separated machines to compile for, such as h100,v5e")
    parser.add_argument("--target_batch", type=int, default=64, help="batch of the compiled figures, in bfloat16")
    parser.add_argument("--no_run", action="store_true", help="compile for the targets only")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the figure")
    args = parser.parse_args(argv)
    chosen = args.backends.split(",") if args.backends else list(BACKENDS)
    targets = [] if args.no_run else [(HERE, args.batch, args.dtype)]
    targets += [(name, args.target_batch, "bfloat16") for name in args.targets.split(",") if name]
    sides = [int(side) for side in args.sides.split(",")]
    rows = []
    try:
        if unknown := [name for name in chosen if name not in BACKENDS]:
            expected = f"some of {', '.join(BACKENDS)}"
            message = f"--backends must be {expected}, got {unknown[0]}"
            raise InputError(message, field="backends", given=unknown[0], expected=expected)
        for target, batch, dtype in targets:
            for side in sides:
                case = benchmark_case(side, batch, dtype, args.window)
                names = [name for name in backends_for(case, target) if name in chosen]
                part = rows_of(case, target, names, args.seconds)
                print_rows(case, target, part)
                rows += part
            for side in sides if target == HERE else ():
                if 2 * side in sides:
                    pair = (benchmark_case(n, batch, dtype, args.window) for n in (side, 2 * side))
                    print_growth(*pair, args.seconds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "window_attention.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        draw_figure(rows, args.out / "window_attention.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
