"""Config files of ml_collections with `--config.KEY=VALUE` overrides."""

from mvar_jax.cli.config_files import find_config, importing_beside
from mvar_jax.errors import InputError


def add_config_argument(parser) -> None:
    """Add `--config FILE`; the main parser collects the overrides."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="config file or a shipped one, such as digits"
    )
    parser.epilog = "Any key of the config is set by --config.KEY=VALUE, such as --config.optimizer.weight_decay=0.1"


def read_config(path: str, overrides: list[str]) -> dict:
    """Load a config as nested dicts, with overrides applied; `build` checks its keys.

    Raises InputError if the file is missing or broken, or a value has another type than in the file.
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
            raise InputError(f"{override} needs a value: {override}=VALUE", field=override.removeprefix("--"))
    try:
        with importing_beside(file):
            values(argv)
        return values.config.to_dict()
    except AttributeError as error:
        raise _refuse(path, f"config file {path} does not have all keys given: {error}") from None
    except (flags.Error, TypeError, ValueError, SyntaxError, ImportError) as error:
        reason = str(error).strip().splitlines()
        words = f"config file {path} cannot be read with the values given: {reason[-1]}"
        raise _refuse(path, words) from None


def _refuse(path: str, words: str) -> InputError:
    return InputError(words, field="config", given=path, expected="a config file and values of its types")
