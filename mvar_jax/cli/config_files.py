"""Find and load config files: at a path, or by name among the shipped ones."""

import contextlib
import difflib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

from ml_collections import ConfigDict

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
    if path := _locate(config):
        return path
    names = shipped_names()
    message = f"--config must be a file or one of {', '.join(names)}, got {config}"
    if near := difflib.get_close_matches(Path(config).stem, names, n=1):
        message += f". Did you mean {near[0]}?"
    raise InputError(message, field="config", given=config, expected="a file or a shipped config")


def split_argument(config: str) -> tuple[str, str | None]:
    """Return (config, ARG) of CONFIG:ARG, ARG being None without a colon; a file whose name has one is itself."""
    ends = [len(config), *(i for i, letter in enumerate(config) if letter == ":")]
    end = next((end for end in ends if _locate(config[:end])), len(config))
    return config[:end], config[end + 1 :] if end < len(config) else None


def _locate(config: str) -> Path | None:
    path = local_path(config, "config", "it is a Python file")
    name = config.removeprefix(f"{_PACKAGE}/").removesuffix(".py")
    if path.is_file():
        return path
    return shipped_folder() / f"{name}.py" if name in shipped_names() else None


def load_config(file: Path, argument: str | None) -> ConfigDict:
    """Return what `get_config()` of a config file returns, or `get_config(argument)` unless it is None.

    Raises InputError, with the line of the file, for whatever fails in it, a sys.exit() too.
    """
    arguments = () if argument is None else (argument,)
    with importing_beside(file), _explaining(file):
        name = f"{_PACKAGE}.__main__"
        spec = importlib.util.spec_from_file_location(name, file, loader=SourceFileLoader(name, str(file)))
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise _refuse(file, "must have a function get_config() that returns an ml_collections.ConfigDict")
        _check_argument(file, get_config, argument)
        config = get_config(*arguments)
        if not isinstance(config, ConfigDict | dict):
            given = f"{type(config).__name__} {config!r}" if config is not None else None
            raise _refuse(file, f"must return an ml_collections.ConfigDict from get_config(), got {given}")
        return ConfigDict(config)  # a frozen one too


def _check_argument(file: Path, get_config: Callable, argument: str | None) -> None:
    try:
        inspect.signature(get_config).bind(*(() if argument is None else (argument,)))
    except TypeError:
        if argument is None:
            words = f"needs an argument for its get_config: pass --config={file}:ARG"
        else:
            words = f"has a get_config() that takes no argument, got {argument!r}: pass --config={file}"
        raise _refuse(file, words) from None


@contextlib.contextmanager
def _explaining(file: Path) -> Iterator[None]:
    """Turn an error of a config file or of one that it imports into an InputError with file and line."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((Path(error.filename or ""), error.lineno))
        folders = (file.resolve().parent, shipped_folder())
        own = [(path, line) for path, line in places if path.resolve().parent in folders and path.is_file()]
        path, line = own[-1] if own else (file, None)
        where = f" in line {line}" if line else ""
        where += f" of {path}" if path.resolve() != file.resolve() else ""
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        raise _refuse(file, f"cannot be read{where}: {reason}") from None


def _refuse(file: Path, words: str) -> InputError:
    return InputError(f"config file {file} {words}", field="config", given=str(file), expected="a config file")


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
