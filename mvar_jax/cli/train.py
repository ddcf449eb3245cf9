"""Trains what a config describes, a tokenizer or a transformer; resumes by itself what WORKDIR holds."""

import signal
import sys
from pathlib import Path

from mvar_jax.cli.configuration import add_config_argument, read_config

SUMMARY = "train a tokenizer or a transformer from a config"


def add_arguments(parser) -> None:
    """--config FILE --workdir DIR."""
    add_config_argument(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics and pictures go here")


def run(args) -> int:
    """Exit status 0 when the run is complete or was asked to stop by SIGTERM, 130 after Ctrl-C."""
    config = read_config(args.config, args.overrides)
    from mvar_jax import build
    from mvar_jax.store import MODEL_FILE, write_model_file
    from mvar_jax.training import loop
    from mvar_jax.training.checkpoint import check_config, save_tree

    settings = build.build_settings(config)
    task, modules, tokenizer_params = build.build_task(config)
    workdir = Path(args.workdir)
    check_config(workdir, config)
    if not (workdir / MODEL_FILE).exists():
        if tokenizer_params is not None:  # the workdir is a whole model on its own
            save_tree(workdir / "tokenizer", tokenizer_params)
        write_model_file(workdir, modules, trains=config["task"])
    try:
        result = loop.run(task, workdir, settings, config)
    except loop.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 130 if result.interrupted == signal.SIGINT else 0
