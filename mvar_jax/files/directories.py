"""New directories that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import temporary_path


def check_new(field: str, path: Path) -> None:
    """Raise InputError unless `path` is free or an empty directory."""
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from None
    if not is_free:
        raise _refuse(field, path, "a new or an empty directory")


@contextlib.contextmanager
def new_directory(field: str, path: Path) -> Iterator[Path]:
    """Yield a temporary directory. It becomes `path` if the block succeeds and is removed if the block raises.

    Args:
      field: name of the option that gave the path, for the error.
      path: a free path or an empty directory.

    Raises:
      InputError: `path` is taken or cannot be written.
    """
    check_new(field, path)
    path = path.resolve()
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Make a directory, unless it exists, and check that it can be written. Raises InputError if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _refuse("out", path, "a writable directory", f" ({error.strerror})") from None


def _refuse(field: str, path: Path, expected: str, reason: str = "") -> InputError:
    message = f"--{field} must be {expected}, got {str(path)!r}{reason}"
    return InputError(message, field=field, given=str(path), expected=expected)
