"""What the refiner gives on the digits, and what it costs: base and refined side by side.

    python benchmarks/refiner.py --runs runs/quickstart/refiner,runs/seed1/refiner --record
    python benchmarks/refiner.py --target h100    # no device needed, but jax[cuda12]

--runs: workdirs of the task refiner. Samples of each seed, scored as report.md does, and nats a token of the held-out
digits; a cell has the mean and, in brackets, the worst of the seeds. Then the seconds to draw 250 digits. --target:
sequential steps, work and compiled memory of the sampler, d16 at 256 px with guidance.
Prints tables, and appends them to RESULTS.md with --record; the exit status is 1 if the sampler's memory exceeds its
bound.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

import mvar_jax
from benchmarks.memory import compile_sampler, make_modules, params_of
from benchmarks.stages.report import Report, append_section
from mvar_jax.checkpoints.model_directory import fingerprint
from mvar_jax.digits.measure_run import load_digits
from mvar_jax.digits.quality import Judges, Real, Samples
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB
from mvar_jax.models.draw_order import waves
from mvar_jax.models.refiner import Refiner
from mvar_jax.ops.cost import forward_macs

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
TIMED = 25  # samples of a class that are timed
WINDOWS, MOST_MEMORY = (None, 3, 5), 0.15  # of the refiners whose cost is compared; bound over the base's memory
# figure -> which of several is the worst
FIGURES = {"fd_samples": max, "judge_sample_accuracy": min, "nearest_ratio": min, "within_class_spread": min}
GUIDED = (1.5, 1.0)  # cfg and temperature of the guided samples


def draw(model, num_each: int, seed: int, cfg: float, temperature: float) -> Samples:
    """Draw digits of each class."""
    labels = np.repeat(np.arange(10), num_each)
    parts = [
        model.sample(labels[index], seed=seed, cfg=cfg, temperature=temperature, index=index)
        for index in np.array_split(np.arange(len(labels)), max(1, num_each // 10))
    ]
    images, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Samples(images, labels, ids)


def nats(model, real: Real) -> float:
    """Return the nats a token of the held-out digits."""
    scores_BS = model.score(model.encode(real.heldout), real.heldout_labels)
    return float(np.mean(np.sum(scores_BS, axis=1)) / model.num_tokens)


def drawing_seconds(model) -> float:
    """Return the CPU seconds to draw and decode some digits of each class, the median of five draws."""
    draw = functools.partial(model.sample, np.repeat(np.arange(10), TIMED), cfg=0.0)
    seconds = []
    for seed in range(6):
        begin = time.process_time()
        np.asarray(draw(seed=seed)[0])
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds[1:])  # the first compiles


def measure_digits(report: Report, args: argparse.Namespace) -> None:
    """Add the table of samples, a transformer's figures once for all its refiners, and that of times."""
    runs, seen = [Path(run) for run in args.runs.split(",")], set()
    splits = load_digits(runs[0], mvar_jax.load(runs[0], args.which).tokenizer.channels)
    judges = Judges(Real(*splits["train"], *splits["val"]))
    settings = [*((0.0, temperature) for temperature in args.temperature), GUIDED]
    for run in runs:
        models = {name: mvar_jax.load(run, args.which, refiner=name == "refiner") for name in ("base", "refiner")}
        base = fingerprint(models["base"].transformer, models["base"].params)
        shown = [item for item in models.items() if item[0] != "base" or base not in seen]
        seen.add(base)
        for (cfg, temperature), (name, model) in itertools.product(settings, shown):
            found = [judges.measure(draw(model, args.num_each, seed, cfg, temperature)) for seed in args.seeds]
            cells = {"workdir": run.name, "cfg": cfg, "T": temperature, "drawn by": name}
            cells["nats a token"] = f"{nats(model, judges.real):.3f}"
            for figure, worst in FIGURES.items():
                values = [figures[figure] for figures in found]
                cells[figure] = f"{statistics.mean(values):.3f} ({worst(values):.3f})"
            cells["distinct"] = min(figures["num_distinct_pyramids"] for figures in found)
            report.add(f"{10 * args.num_each:,} samples of each of the seeds {args.seeds}", **cells)
    seconds = {name: drawing_seconds(model) for name, model in models.items()}
    ratio = seconds["refiner"] / seconds["base"]
    rounded = {f"{name}, CPU s": f"{value:.2f}" for name, value in seconds.items()}
    report.add("Drawing 250 digits", **rounded, ratio=f"{ratio:.2f}")


def refiners_of(transformer) -> list[Refiner]:
    """Return the refiners whose cost is compared, each up to the 10x10 map and of all maps."""
    names = ("sides", "vocab_size", "code_width", "width", "num_heads", "dtype")
    whole = Refiner(**{name: getattr(transformer, name) for name in names})
    up_to_10 = tuple(scale for scale, side in enumerate(whole.sides) if side <= 10)
    return [whole.clone(window=window, scales=scales) for window in WINDOWS for scales in (up_to_10, ())]


def measure_cost(report: Report, target: str, depth: int, batch: int) -> bool:
    """Add sequential steps, work and compiled memory of the sampler; return whether the bound of memory is met."""
    sizes = argparse.Namespace(depth=depth, size=256, dtype="bfloat16", backend="auto")
    tokenizer, transformer = make_modules(sizes, "markov")
    compiling = lambda refiner: compile_sampler(
        target, (tokenizer, transformer), batch, jnp.dtype("bfloat16"), refiner=refiner
    )
    base, is_kept = compiling(None).total_bytes, True
    num_scales = len(transformer.sides)
    macs = forward_macs(transformer.pyramid, transformer.depth, transformer.width, 4096, 32)
    head = ("drawn by", "scales", "parameters, M", "GFLOP an image", "sequential steps", "MiB", "over the base")
    add = lambda *cells: report.add(f"Sampler for {target}", **dict(zip(head, cells, strict=True)))
    add("transformer", num_scales, None, f"{2e-9 * macs:.1f}", num_scales, f"{base / MIB:.0f}", None)
    for refiner in refiners_of(transformer):
        whole, refined = compiling(refiner).total_bytes, refiner.refined
        size = sum(x.size for x in jax.tree.leaves(params_of(refiner)))
        steps = num_scales - len(refined) + sum(len(waves(refiner.sides[scale], refiner.window)) for scale in refined)
        is_kept &= whole <= (1 + MOST_MEMORY) * base
        form = "full causal" if refiner.window is None else f"k = {refiner.window}"
        work, memory = f"{2e-9 * (macs + refiner.macs(refined)):.1f}", f"{whole / MIB:.0f}"
        add(form, len(refined), f"{size / 1e6:.1f}", work, steps, memory, f"{whole / base - 1:+.1%}")
    return is_kept


def _numbers(kind):
    return lambda text: tuple(map(kind, text.split(",")))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", help="workdirs of the refiner's task, by commas")
    parser.add_argument("--which", default="best", choices=("best", "last"), help="of --runs (default best)")
    parser.add_argument("--seeds", type=_numbers(int), default=(0, 1, 2), help="of samples (default 0,1,2)")
    parser.add_argument("--num_each", type=int, default=100, help="samples of a class and seed (default 100)")
    parser.add_argument("--temperature", type=_numbers(float), default=(1.0, 1.2), help="by commas (default 1.0,1.2)")
    parser.add_argument("--target", help="here, or a machine that is not: h100, v5e, ...")
    parser.add_argument("--depth", type=int, default=16, help="of the transformer of --target")
    parser.add_argument("--batch", type=int, default=32, help="images of --target; guidance doubles the rows")
    parser.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the tables to RESULTS.md"
    )
    args = parser.parse_args(argv)
    report = Report()
    try:
        if args.runs:
            measure_digits(report, args)
        is_kept = args.target is None or measure_cost(report, args.target, args.depth, args.batch)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.record is not None:
        append_section(args.record, "refiner.py", f"`{' '.join(argv)}`, jax {jax.__version__}", report.rows)
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
