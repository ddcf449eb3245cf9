"""Reading an ml_collections config file with `--config.key=value` overrides."""

from pathlib import Path

from mvar_jax.errors import InputError


def add_config_argument(parser) -> None:
    """`--config FILE`; overrides are collected by the main parser."""
    parser.add_argument("--config", required=True, metavar="FILE", help="config file, as configs/digits.py")
    parser.epilog = "Any key of the config is set by --config.KEY=VALUE, as --config.optimizer.weight_decay=0.1"


def read_config(path: str, overrides: list[str]) -> dict:
    """The config as nested dicts. Raises InputError for a missing file, an unknown key or a value of a wrong type."""
    from absl import flags
    from ml_collections import config_flags

    if not Path(path).is_file():
        raise InputError("config", path, "an existing config file")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for override in overrides:
        if "=" not in override:
            raise InputError(override.removeprefix("--"), None, f"a value, as {override}=VALUE")
    try:
        values(["mvar", f"--config={path}", *overrides])
        return values.config.to_dict()
    except flags.UnrecognizedFlagError as error:
        raise _unknown_key(error.flagname, path, overrides, values) from None
    except AttributeError as error:
        raise InputError("config", path, f"a config that has the keys given ({error})") from None
    except (flags.Error, TypeError, ValueError, SyntaxError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise InputError("config", path, f"a readable config and values of its types ({reason[-1]})") from None


def _unknown_key(flag: str, path: str, overrides: list[str], values) -> InputError:
    import difflib

    given = next(o.split("=", 1)[1] for o in overrides if o.startswith(f"--{flag}="))
    config = values.config
    *parents, last = flag.removeprefix("config.").split(".")
    for parent in parents:
        if parent not in config:
            return InputError(flag, given, f"a key of {path}; it has {', '.join(sorted(config.keys()))}")
        config = config[parent]
    known = sorted(config.keys()) if hasattr(config, "keys") else []
    near = difflib.get_close_matches(last, known, n=1)
    return InputError(flag, given, f"a key of {path}: " + (f"{near[0]}, perhaps" if near else ", ".join(known)))
