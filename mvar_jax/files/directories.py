"""A new directory that appears complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import temporary_path


def check_new(field: str, path: Path) -> None:
    """Raises InputError unless `path` is free or an empty directory."""
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise InputError(field, str(path), f"a writable directory ({shorten(error)})") from None
    if not is_free:
        raise InputError(field, str(path), "a new or an empty directory")


@contextlib.contextmanager
def new_directory(field: str, path: Path) -> Iterator[Path]:
    """A sibling to write into, which becomes `path` if the block succeeds and is removed if it fails."""
    check_new(field, path)
    path = path.resolve()
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(field, str(path), f"a writable directory ({shorten(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Makes a directory that can be written. Raises InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError("out", str(path), f"a directory that can be written ({error.strerror})") from None
