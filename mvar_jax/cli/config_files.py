"""Find config files: at a path, or by name among the shipped ones."""

import contextlib
import difflib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import mvar_jax
from mvar_jax.errors import InputError
from mvar_jax.files.paths import local_path

_PACKAGE = "configs"


def shipped_folder() -> Path:
    """Return the folder of the configs that ship: inside an installed package, beside it in a checkout."""
    package = Path(mvar_jax.__file__).parent
    return next(path for path in (package / _PACKAGE, package.parent / _PACKAGE) if path.is_dir())


def shipped_names() -> list[str]:
    """Return the names of the configs that ship, such as digits."""
    return sorted(path.stem for path in shipped_folder().glob("[!_]*.py"))


def find_config(config: str) -> Path:
    """Return the file at the path `config`, else the shipped config of that name.

    `digits` and `configs/digits.py` name the same shipped config, so the commands of its docstring
    work in any folder. Raises InputError if there is neither.
    """
    path = local_path(config, "config", "it is a Python file")
    if path.is_file():
        return path
    names = shipped_names()
    name = config.removeprefix(f"{_PACKAGE}/").removesuffix(".py")
    if name in names:
        return shipped_folder() / f"{name}.py"
    message = f"--config must be a file or one of {', '.join(names)}, got {config}"
    if near := difflib.get_close_matches(path.stem, names, n=1):
        message += f". Did you mean {near[0]}?"
    raise InputError(message, field="config", given=config, expected="a file or a shipped config")


@contextlib.contextmanager
def importing_beside(config: Path) -> Iterator[None]:
    """Let a config import others by `from configs import NAME`: those of its own folder, then the shipped ones.

    The package `configs` exists only inside this context; it is not installed.
    """
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(config.resolve().parent), str(shipped_folder())]
    before = _pop_configs()
    sys.modules[_PACKAGE] = package
    try:
        yield
    finally:
        _pop_configs()
        sys.modules.update(before)


def _pop_configs() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]
    return {name: sys.modules.pop(name) for name in names}
