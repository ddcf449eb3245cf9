"""New directories that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import temporary_path
from mvar_jax.files.paths import as_path, is_store


def check_new(field: str, path: Path) -> None:
    """Raise InputError unless `path` is free or an empty directory."""
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from None
    if not is_free:
        raise _refuse(field, path, "a new or an empty directory")


@contextlib.contextmanager
def new_directory(field: str, path: Path, last: str = "") -> Iterator[Path]:
    """Yield a temporary directory of this machine. It becomes `path` if the block succeeds, else it is removed.

    Args:
      field: name of the option that gave the path, for the error.
      path: a free path or an empty directory.
      last: name of the file without which the directory counts as unfinished. In an object store, where a folder
        does not appear at once, it comes last, and a failed upload is removed.

    Raises:
      InputError: `path` is taken or cannot be written.
    """
    check_new(field, path)
    try:
        if is_store(path):
            with tempfile.TemporaryDirectory(prefix="mvar_") as folder:
                yield Path(folder)
                _upload_new(Path(folder), path, last)
            return
        path = path.resolve()
        temporary = temporary_path(path)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from error


def _upload_new(folder: Path, path: Path, last: str) -> None:
    try:
        upload_folder(folder, path, last)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(path)
        raise


def upload_folder(folder: Path, path: Path, last: str = "") -> None:
    """Copy the files of a folder of this machine into a folder of a store, the file named `last` last."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: name == last):
        (path / name).upload(folder / name)  # type: ignore[attr-defined]


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[Path]:
    """Yield a folder for a library that writes only to this machine: `path`, or a temporary one copied there."""
    if not is_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mvar_") as folder:
        yield Path(folder)
        upload_folder(Path(folder), path)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, if it exists and can be removed."""
    if is_store(path):
        with contextlib.suppress(OSError):
            path.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_directory(path: Path, field: str = "out") -> None:
    """Make a directory, unless it exists, and check that it can be written. Raises InputError if it cannot."""
    path = as_path(path, field)
    try:
        if is_store(path):
            probe = temporary_path(path / "probe")
            probe.write_bytes(b"")
            probe.unlink()
            return
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from None


def _refuse(field: str, path: Path, expected: str, reason: str = "") -> InputError:
    message = f"--{field} must be {expected}, got {str(path)!r}{reason}"
    return InputError(message, field=field, given=str(path), expected=expected)
