"""Encodes a data set with a tokenizer into a token cache, from which a transformer trains."""

import dataclasses
from pathlib import Path

from mvar_jax.cli.configuration import add_config_argument, read_config

SUMMARY = "encode images into a token cache"


def add_arguments(parser) -> None:
    """--config FILE --tokenizer DIR --out DIR."""
    add_config_argument(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the cache is written")


def run(args) -> int:
    """Writes both splits of the config's data; an existing cache of the same tokenizer and views is kept."""
    config = read_config(args.config, args.overrides)
    from mvar_jax import build

    build.check_config(config)
    data = build.fill(build.DataOptions, "data", config["data"])

    from mvar_jax.data.encode import write_cache
    from mvar_jax.evaluation.draw import make_directory
    from mvar_jax.model import load
    from mvar_jax.store import fingerprint

    model = load(args.tokenizer)
    model.tokenizer.check(data.image_size)
    make_directory(Path(args.out))
    sources = {split: data.open(split) for split in ("train", "val")}
    description = {k: v for k, v in dataclasses.asdict(data).items() if k not in ("cache", "num_views")}
    is_new = write_cache(
        args.out,
        Path(args.tokenizer).absolute(),
        model,
        fingerprint(model.tokenizer, model.tokenizer_params),
        sources,
        data.transform(),
        description,
        num_views=data.num_views,
        seed=config["seed"],
    )
    print(f"{args.out}: {'written' if is_new else 'already complete'}")
    return 0
