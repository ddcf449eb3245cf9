"""Plan a run on machines that are not here: compile its own programs for them, and print memory, work and time.

Neither data nor weights are needed. CUDA targets need the extra cuda12, TPU targets the extra tpu.
"""

from mvar_jax.cli.configuration import add_config_argument, read_config
from mvar_jax.cli.machine import add_cache_argument, plans_folder
from mvar_jax.cli.sampling import check_positive
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path

SUMMARY = "compile a config for machines that are not here: memory, work, time, and whether it fits"


def add_arguments(parser) -> None:
    """Add --config, --topology and what is planned."""
    add_config_argument(parser)
    add_cache_argument(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME[:SHAPE]",
        help="v5e:16x16 (a TPU slice), h100:8, h100:2x8 (hosts x cards), rtx4090:8, ..., or here: the devices of "
        "this machine",
    )
    parser.add_argument(
        "--parts",
        default="train,sample,cache",
        metavar="PART[,PART]",
        help="programs to compile: train, sample and cache, that of cache_tokens (default all)",
    )
    words = "images that the sampler draws at once, over all devices (default 32)"
    parser.add_argument("--samples", type=int, default=32, metavar="N", help=words)
    words = "number of training images, if the config counts in epochs and it is not ImageNet's"
    parser.add_argument("--images", type=int, metavar="N", help=words)
    words = "config of the tokenizer (default: that of the config's data if it is there, else the published one)"
    parser.add_argument("--tokenizer", metavar="FILE", help=words)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--chart", metavar="FILE", help="write a bar chart of memory and time as PNG")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--search",
        type=int,
        metavar="SECONDS",
        help="try meshes, remat, accumulate_steps, on GPUs scan_unroll, for so long; report the fastest that fits",
    )
    words = "report VAR too, the same model with full conditioning, and its memory and time over MVAR's"
    modes.add_argument("--compare", choices=("var",), help=words)


def run(args) -> int:
    """Print the report; the exit status is 0 even if it does not fit."""
    config = read_config(args.config, args.overrides)
    check_positive(args, "samples", *(name for name in ("images", "search") if getattr(args, name) is not None))
    files = {name: as_path(path, name) for name in ("json", "chart") if (path := getattr(args, name)) is not None}
    for name, path in files.items():
        if path.is_dir():
            raise InputError(f"--{name} must be a file, got the folder {path}", field=name, given=str(path))

    from mvar_jax import build
    from mvar_jax.hardware.compiling import devices_of
    from mvar_jax.planning.compare import compare_views, comparison_to_json, describe_comparison
    from mvar_jax.planning.plan import Request, make_plan
    from mvar_jax.planning.report import describe, draw_chart, to_json
    from mvar_jax.planning.search import describe_tries, search, tries_to_json
    from mvar_jax.training.programs import PARTS

    parts = tuple(args.parts.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        expected = f"some of {', '.join(PARTS)}"
        raise InputError(f"--parts must be {expected}, got {unknown[0]}", field="parts", given=args.parts)
    tokenizer = None
    if args.tokenizer is not None:
        of_tokenizer = read_config(args.tokenizer, [])
        if of_tokenizer.get("task") != "tokenizer":
            words = f"--tokenizer must be the config of a tokenizer, got one with task {of_tokenizer.get('task')}"
            raise InputError(words, field="tokenizer", given=args.tokenizer, expected="a tokenizer's config")
        tokenizer = build.build_module(of_tokenizer)
    build.check_config(config)
    devices_of(args.topology)  # an unknown one, or a missing compiler, is said before anything is compiled
    folder = plans_folder(args.compilation_cache)
    request = Request(args.config, args.topology, parts, args.samples, args.images, tokenizer, folder)
    if args.compare:
        found = compare_views(config, request)
        print(describe_comparison(*found))
        plan, values = found[0], comparison_to_json(*found)
    elif args.search is not None:
        tries = search(config, request, args.search)
        print(describe_tries(tries))
        plan, values = tries[0].plan, tries_to_json(tries)
    else:
        plan = make_plan(config, request)
        print(describe(plan))
        values = to_json(plan)
    if "json" in files:
        from mvar_jax.files.atomic import write_json

        write_json(files["json"], values)
    if "chart" in files:
        draw_chart(files["chart"], plan)
    return 0
