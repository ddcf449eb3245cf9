"""Directories of one writer: new ones, which appear complete or not at all, and errors that name them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError, RunError, describe_file_error, is_file_error, shorten
from mvar_jax.files.atomic import NAME_BYTES, fit_name, sync, sync_tree
from mvar_jax.files.locks import LEASE_FILE, LOCK_FILE, acquire
from mvar_jax.files.paths import is_store

_LOCKS = {LOCK_FILE, LEASE_FILE}


def check_new(field: str, path: Path) -> None:
    """Raise InputError unless `path` is free or an empty directory; a lock is nothing."""
    try:
        is_free = not path.exists() or (path.is_dir() and {entry.name for entry in path.iterdir()} <= _LOCKS)
    except OSError as error:
        raise _refuse(field, path, "a writable directory", f" ({shorten(error)})") from None
    if not is_free:
        raise _refuse(field, path, "a new or an empty directory")


@contextlib.contextmanager
def naming_errors(field: str, folder: Path, kept: str) -> Iterator[None]:
    """Raise an error of a file or its disk as a RunError of one sentence, which names the folder if it is in it.

    field: option that gave the folder. kept: what is left, as the end of the sentence.
    """
    try:
        yield
    except OSError as error:
        if not is_file_error(error):
            raise
        reason = describe_file_error(error)
        if not error.filename or reason.startswith((f"{folder}/", f"{folder}: ")):
            reason = f"{field} {folder} cannot be written ({reason.removeprefix(f'{folder}/')})"
        raise RunError(f"{reason}; {kept}") from error


@contextlib.contextmanager
def new_directory(field: str, path: Path, last: str = "") -> Iterator[Path]:
    """Hold a new directory and yield a temporary one, whose files it gets if the block succeeds.

    The temporary directory is removed if the block fails, or by the next writer of `path` after a kill.

    Args:
      field: name of the option that gave the path, for the error.
      path: a free path or an empty directory.
      last: name of the file without which the directory counts as unfinished. In an object store, where a folder
        does not appear at once, it comes last, and a failed upload is removed.

    Raises:
      InputError: `path` is taken, in use, or cannot be written.
      RunError: the block raised an error of a file or its disk.
    """
    check_new(field, path)
    path = path.resolve()
    is_new = not path.exists()
    lock = acquire(path, field)
    try:
        check_new(field, path)  # another writer may have ended meanwhile
        with naming_errors(field, path, "nothing was written; run the command again"):
            if is_store(path):
                with tempfile.TemporaryDirectory(prefix="mvar_") as folder:
                    yield Path(folder)
                    _upload_new(Path(folder), path, last)
                return
            temporary = path.with_name(fit_name(f".{path.name}.unfinished", NAME_BYTES))
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                sync_tree(temporary)
                lock.release()  # whose file would be in the way; who takes the lock now makes the next line fail
                os.replace(temporary, path)
                sync(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                path.rmdir()  # if it is empty


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


def _refuse(field: str, path: Path, expected: str, reason: str = "") -> InputError:
    message = f"--{field} must be {expected}, got {str(path)!r}{reason}"
    return InputError(message, field=field, given=str(path), expected=expected)
