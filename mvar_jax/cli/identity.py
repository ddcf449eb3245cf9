"""The options of a command on which its files depend, for `owned_folder`."""

from typing import Any

_NOT_OF_THE_FILES = {"command", "run", "overrides", "out", "distributed", "compilation_cache"}


def options_of(args, *others: str) -> dict[str, Any]:
    """Return the parsed options that affect a command's files, by name, without `others`.

    A slash at the end of a path is no difference.
    """
    left_out = _NOT_OF_THE_FILES | set(others)
    values = {name: value for name, value in vars(args).items() if name not in left_out}
    return {name: value.rstrip("/") if isinstance(value, str) else value for name, value in values.items()}
