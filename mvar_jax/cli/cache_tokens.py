"""Encode a data set with a tokenizer into a token cache, from which a transformer trains.

Resumable: rerunning the command continues with the first unfinished shard and leaves the same files.
"""

from mvar_jax.cli.configuration import add_config_argument, read_config
from mvar_jax.cli.machine import add_machine_arguments, print_machine, use_compilation_cache
from mvar_jax.cli.models import add_precision_argument
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path
from mvar_jax.processes import group

SUMMARY = "encode images into a token cache"


def add_arguments(parser) -> None:
    """--config FILE --tokenizer DIR --out DIR."""
    add_config_argument(parser)
    add_machine_arguments(parser)
    add_precision_argument(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the cache; one run's alone")
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="images at a time (default 64)")
    parser.add_argument(
        "--images_per_shard",
        type=int,
        default=8192,
        metavar="N",
        help="images of a file; an interruption loses at most one (default 8192)",
    )


def run(args) -> int:
    """Write both splits of the config's data. A finished cache of the same tokenizer and data is kept."""
    config = read_config(args.config, args.overrides)
    from mvar_jax import build
    from mvar_jax.tokens.cache_writer import classes_in

    tokenizer, out = as_path(args.tokenizer, "tokenizer"), as_path(args.out, "out")
    config = build.with_class_order(config, classes_in(out))
    data = build.build_data(config)
    for name in ("batch_size", "images_per_shard"):
        if (given := getattr(args, name)) < 1:
            message = f"--{name} must be 1 or more, got {given}"
            raise InputError(message, field=name, given=given, expected="1 or more")
    data.transform().check_views(data.num_views)
    use_compilation_cache(args.compilation_cache)

    import jax
    import numpy as np

    from mvar_jax.api import load
    from mvar_jax.models.networks import check_same
    from mvar_jax.processes.holding import owned_folder
    from mvar_jax.stopping import StopFlag
    from mvar_jax.tokens.cache_reader import read_meta
    from mvar_jax.tokens.encode import write_cache
    from mvar_jax.tokens.opening import image_size_of

    if group.current().count > 1:
        print_machine()
    model = load(tokenizer, precision=args.precision)
    check_same(image_size_of(model.tokenizer, data))
    sources = data.open_all()
    if jax.process_index() == 0:
        for source in sources.values():
            print(*(f"{note}\n" for note in source.notes), sep="", end="", flush=True)
    owning = owned_folder("out", out, "cache_tokens", None)
    with owning, StopFlag(notice="stopping; the finished shards are kept") as stop:
        is_new = write_cache(
            out,
            tokenizer.absolute(),
            model.networks,
            sources,
            data.transform(model.tokenizer.channels),
            data.describe(),
            num_views=data.num_views,
            seed=config["seed"],
            batch_size=args.batch_size,
            images_per_shard=args.images_per_shard,
            loading=data.loading(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            wait=lambda: group.current().wait_for_all("cache_tokens"),
            check_stop=stop.raise_if_set,
        )
    meta = read_meta(out) if jax.process_index() == 0 else {"splits": {}}
    num_tokens = sum(side**2 for side in model.tokenizer.sides)
    for split, entry in meta["splits"].items():
        bad = f", {len(entry['skipped'])} skipped" if entry.get("skipped") else ""
        per_image = entry["num_views"] * num_tokens * np.dtype(meta["dtype"]).itemsize
        sizes = f"{per_image:,} bytes of tokens an image, {entry['bytes']:,} bytes of files"
        print(f"{split}: {entry['num_records']} images, {entry['num_views']} views, {sizes}{bad}")
    print(f"{args.out}: {'written' if is_new else 'already complete'}")
    return 0
