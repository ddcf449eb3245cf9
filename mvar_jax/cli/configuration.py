"""Reading an ml_collections config file with `--config.key=value` overrides."""

from mvar_jax.cli.config_files import find_config, importing_beside
from mvar_jax.errors import InputError


def add_config_argument(parser) -> None:
    """`--config FILE`; overrides are collected by the main parser."""
    parser.add_argument("--config", required=True, metavar="FILE", help="config file or shipped one, as digits")
    parser.epilog = "Any key of the config is set by --config.KEY=VALUE, as --config.optimizer.weight_decay=0.1"


def read_config(path: str, overrides: list[str]) -> dict:
    """The config as nested dicts, overrides applied; whether its keys are known is for `build` to say.

    Raises InputError for a missing or broken file, or a value of another type than the file has.
    """
    from absl import flags
    from ml_collections import config_flags

    file = find_config(path)
    values = flags.FlagValues()
    argv = ["mvar", f"--config={file}", *overrides]
    config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv, lock_config=False, accept_new_attributes=True
    )
    for override in overrides:
        if "=" not in override:
            raise InputError(override.removeprefix("--"), None, f"a value, as {override}=VALUE")
    try:
        with importing_beside(file):
            values(argv)
        return values.config.to_dict()
    except AttributeError as error:
        raise InputError("config", path, f"a config that has the keys given ({error})") from None
    except (flags.Error, TypeError, ValueError, SyntaxError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise InputError("config", path, f"a readable config and values of its types ({reason[-1]})") from None
