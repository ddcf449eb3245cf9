"""The command line that a launch file ends in, parsed with the real flags and configs."""

from stand_ins import ROOT

from mvar_jax import build
from mvar_jax.__main__ import make_parser
from mvar_jax.cli.configuration import read_config


def check_command(words: list[str], config: str, workdir: str, distributed: str) -> dict:
    """Parse what a launch file runs as the program would; return the config."""
    assert words[:4] == [".venv/bin/python", "-m", "mvar_jax", "train"]
    args, overrides = make_parser().parse_known_args(words[3:])
    assert all(word.startswith("--config.") for word in overrides), overrides
    assert (args.config, args.workdir, args.distributed) == (config, workdir, distributed)
    read = read_config(str(ROOT / args.config), overrides)
    build.build_settings(read)
    build.build_module(read)
    return read
