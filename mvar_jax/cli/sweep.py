"""Try a grid of sampling options: draw and score samples at each point, and mark the best one.

--cfg, --temperature, --top_k, --top_p and --refine_scales take lists, and every combination is a point. All points
have the same labels, seed and noise. Writes sweep.csv (options, scores and seconds a sample of each point, without
compilation, on this machine) and sweep.png, the distance against the cost with the chosen point marked. A run on the
digits is judged as in the quickstart's report (Frechet distance and recognised samples), any other model by FID and
inception score against --reference, as `evaluate` computes them. Resumable: rerunning the command, also with another
grid, draws the points that sweep.csv lacks.
"""

import contextlib
import dataclasses
import itertools
import sys
from typing import Any

from mvar_jax.cli.machine import AUTO, use_compilation_cache
from mvar_jax.cli.models import add_model_arguments, add_tokenizer_argument, load_for_sampling
from mvar_jax.cli.sampling import add_drawing_arguments, add_switch_argument, check_positive, numbers_of, scales_of
from mvar_jax.errors import InputError

SUMMARY = "try a grid of sampling options and score each point"

ALL, NONE = "all", "off"  # of --refine_scales
NUM_SAMPLES = 1000


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep; one run's alone")
    _add_grid(parser.add_argument_group("the grid: values separated by spaces"))
    _add_scoring(parser.add_argument_group("scores"))
    _add_drawing(parser.add_argument_group("samples of each point"))


def _add_grid(parser) -> None:
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.5], help="guidances (default 1.5)")
    parser.add_argument(
        "--temperature",
        type=numbers_of,
        nargs="+",
        default=[1.0],
        metavar="T[,T]",
        help='temperatures, each one number or one for each scale, as "1 1.2 1.2,1.2,1,1,1" (default 1)',
    )
    parser.add_argument("--top_k", type=int, nargs="+", default=[0], help="as in `mvar sample` (default 0)")
    parser.add_argument("--top_p", type=float, nargs="+", default=[0.0], help="as in `mvar sample` (default 0)")
    parser.add_argument(
        "--refine_scales",
        dest="refined",
        nargs="+",
        default=[ALL],
        metavar="all|off|N,N",
        help='scales that the refiner draws: all that it was trained for (default), off or numbers, as "off all 0-3"',
    )


def _add_scoring(parser) -> None:
    parser.add_argument(
        "--reference", metavar="PATH", help="as in `mvar evaluate`; not needed for a run on the digits"
    )
    parser.add_argument("--inception", metavar="FILE", help="as in `mvar evaluate`, with --reference")
    parser.add_argument(
        "--inception_batch", type=int, metavar="B", help="images of a device at a time (default 256, on a CPU 4)"
    )
    parser.add_argument(
        "--least",
        type=float,
        metavar="X",
        help="the chosen point is the one of the lowest distance with at least this share of recognised digits "
        "(default: what the report requires) or this inception score (default 0)",
    )


def _add_drawing(parser) -> None:
    parser.add_argument(
        "--num_samples",
        type=int,
        default=NUM_SAMPLES,
        metavar="N",
        help=f"samples of all labels in turn, or of labels spread evenly if they are fewer (default {NUM_SAMPLES})",
    )
    parser.add_argument("--labels", metavar="L,L", help="as in `mvar sample` (default: all classes)")
    parser.add_argument("--smooth", action="store_true", help="as in `mvar sample`")
    add_switch_argument(parser)
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="samples per batch (default 64)")
    add_drawing_arguments(parser)


def run(args) -> int:
    """Run the command; everything is checked before the first sample is drawn."""
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.files.paths import as_path
    from mvar_jax.values import as_real, as_seed

    grid = options_of_grid(args)
    check_positive(args, "num_samples", "batch_size", "weight_shards")
    as_seed(args.seed)
    if args.least is not None:
        as_real(args.least, "least", -sys.float_info.max, sys.float_info.max, "a finite number")
    checkpoint, out = as_path(args.checkpoint, "checkpoint"), as_path(args.out, "out")
    names = class_names_of(checkpoint)
    labels = None if args.labels is None else names.numbers_of(args.labels)
    use_compilation_cache(AUTO)

    from mvar_jax.evaluation.sample_sets import SampleSet
    from mvar_jax.evaluation.sweep import AXES, CSV_FILE, Point, Sweep, describe
    from mvar_jax.files.directories import remove_tree
    from mvar_jax.ops.pixels import check_scored
    from mvar_jax.processes.holding import UNFINISHED, owned_folder
    from mvar_jax.sampling.order import Order
    from mvar_jax.stopping import StopFlag

    args.refiner, args.refine_scales = "on", None  # the grid says which scales
    model, networks, mesh = load_for_sampling(args)
    if args.reference is not None:
        check_scored(model.tokenizer.channels, "--reference")
    for options in grid:
        options.check_scales(len(model.tokenizer.sides))
    points = {
        point.key: point
        for (text, refined), options in itertools.product(refinements(networks, args.refined), grid)
        for point in [Point(options, text, refined)]
    }
    labels = model.labels(range(model.num_classes) if labels is None else labels)
    drawing = {"seed": args.seed, "batch_size": args.batch_size, "truncates": args.truncate_uint8}
    order = Order.of_total(tuple(labels.tolist()), args.num_samples, grid[0], **drawing)
    side, classes = model.tokenizer.image_size, {"labels_N": order.labels_N, "num_model_classes": model.num_classes}
    some = SampleSet("samples", args.num_samples, (side, side), lambda rows: None, {}, **classes)
    with contextlib.ExitStack() as stack:
        judge, least = open_judge(args, checkpoint, some, out / UNFINISHED, stack)
        sweep = Sweep([*points.values()], order, some.size, mesh, judge, least)
        same = {name: value for name, value in order.identity(networks).items() if name not in AXES}
        identity = {"num_samples": args.num_samples, **same, **judge.about}
        stack.enter_context(owned_folder("out", out, "sweep", identity))
        for warning in judge.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        stop = stack.enter_context(StopFlag(notice="stopping after this batch"))
        rows = sweep.run(out, stop.raise_if_set)
        remove_tree(out / UNFINISHED)
    best = sweep.choose(rows)
    if best is None:
        print(f"{out / CSV_FILE}: {len(rows)} points, none with {judge.quality} of {least:g} or more")
    else:
        scores = ", ".join(f"{name} {float(best[name]):.4g}" for name in (judge.distance, judge.quality))
        print(f"{out / CSV_FILE}: {len(rows)} points, chosen: {describe(best, rows)}; {scores}")
    return 0


def options_of_grid(args) -> list[Any]:
    """Return the `SampleOptions` of all combinations but for the refined scales.

    Raises InputError if a value is out of range.
    """
    from mvar_jax.sampling.options import SampleOptions

    combined = itertools.product(args.cfg, args.top_k, args.top_p, args.temperature)
    return [SampleOptions(cfg, k, p, args.smooth, temperature) for cfg, k, p, temperature in combined]


def refinements(networks, texts: list[str]) -> list[tuple[str, Any]]:
    """Return (text for the CSV, networks) of each value of --refine_scales. Raises InputError for unknown scales."""
    has_refiner = any(part is not None and part.refiner is not None for part in (networks, networks.later))
    found = []
    for text in texts:
        if text == NONE or (text == ALL and not has_refiner):
            found.append((NONE, networks.with_refiner(False)))
        elif text == ALL:
            found.append((ALL, networks))
        else:
            scales = scales_of(text)
            found.append((",".join(map(str, scales)), networks.with_refiner(scales=scales)))
    return found


def open_judge(args, checkpoint, some, unfinished, stack: contextlib.ExitStack) -> tuple[Any, float]:
    """Return (the `Judge`, the quality that the chosen point must have). some: a `SampleSet` as those to be scored.

    Raises InputError if the reference or the network cannot be used, or the samples are too few or of no known data.
    """
    if args.reference is None:
        judge, least = judge_of_digits(args, checkpoint, some)
    else:
        judge, least = judge_of_reference(args, some, unfinished, stack), 0.0
    return judge, least if args.least is None else args.least


def judge_of_digits(args, checkpoint, some) -> tuple[Any, float]:
    """Return (the judge of a run on the digits, the share of recognised samples that the report requires)."""
    import numpy as np

    from mvar_jax.data.options import DataOptions
    from mvar_jax.digits.report import REQUIREMENTS
    from mvar_jax.digits.scorer import DigitScorer
    from mvar_jax.evaluation.image_sets import CONFIG_FILE, WorkdirConfig
    from mvar_jax.evaluation.scoring import find_label_warnings
    from mvar_jax.evaluation.sweep import Judge
    from mvar_jax.fields import from_dict
    from mvar_jax.files.json_files import read_json

    path = checkpoint / CONFIG_FILE
    try:
        data = from_dict(DataOptions, read_json(path, WorkdirConfig)["data"], "data") if path.exists() else None
    except (OSError, ValueError):
        data = None
    if args.inception is not None:
        message = "--inception needs --reference, what the samples are compared with; give both or neither"
        raise InputError(message, field="reference", given=None, expected="a reference")
    if data is None or data.source != "digits":
        message = f"give --reference and --inception, since {checkpoint} is no run on the digits"
        raise InputError(message, field="reference", given=None, expected="a reference")
    if args.num_samples < 2:
        message = "--num_samples must be at least 2, as a covariance needs, got 1"
        raise InputError(message, field="num_samples", given=1, expected="at least 2")
    scorer = DigitScorer(some.size[0], data.split_seed, data.val_fraction, args.num_samples)
    distance, quality = scorer.names

    def score(samples) -> dict[str, float]:
        begins = range(0, samples.num_images, args.batch_size)
        parts = [range(begin, min(begin + args.batch_size, samples.num_images)) for begin in begins]
        return scorer.score((samples.read(part), samples.labels_N[np.asarray(part)]) for part in parts)

    about = {"reference": {"source": "digits", "split_seed": data.split_seed, "val_fraction": data.val_fraction}}
    bound = next(row.bound for row in REQUIREMENTS if row.figure == "judge_sample_accuracy")
    return Judge(distance, quality, score, about, find_label_warnings(some)), float(bound)


def judge_of_reference(args, some, unfinished, stack: contextlib.ExitStack) -> Any:
    """Return the judge by FID and inception score, as `evaluate` computes them, against --reference."""
    from mvar_jax.cli.evaluate_samples import check_network, open_network, open_reference
    from mvar_jax.evaluation.scoring import Comparison, check_sets, find_warnings
    from mvar_jax.evaluation.sweep import Judge
    from mvar_jax.files.directories import remove_tree

    if args.inception_batch is not None:
        check_positive(args, "inception_batch")
    weights, asked = open_network(args), ("fid", "inception_score")
    args.image_size = None  # the samples' own
    reference = open_reference(args, some, stack)
    check_network(reference, weights)
    check_sets(some, reference, asked)
    comparison = Comparison(some, reference, weights, asked, batch_size=args.inception_batch, reads_ahead=False)

    def score(samples) -> dict[str, float]:
        remove_tree(unfinished / "samples")  # features of another point
        found, _ = dataclasses.replace(comparison, samples=samples).run(unfinished)
        return {name: found[name] for name in asked}

    about = {"inception": sorted(weights.sources.values()), **reference.about}
    return Judge(*asked, score, about, find_warnings(comparison))
