"""A workdir: the one run that holds it."""

import fcntl
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import remove_leftovers

LOCK_FILE = ".lock"


@contextmanager
def hold_workdir(workdir: Path):
    """Hold the workdir for one run. The first process holds the lock for all; it ends with that process.

    Raises InputError in every process if another run holds the workdir or it cannot be written.
    """
    file, refusal = None, None
    if jax.process_index() == 0:
        try:
            file = _lock(workdir)
            remove_leftovers(workdir)
        except InputError as error:
            refusal = error
    if not _agree(refusal is None):
        words = f"workdir {workdir} cannot be locked by the first process"
        raise refusal or _refuse(workdir, words, "a directory that the first process can lock")
    try:
        yield
    finally:
        if file:
            file.close()


def _lock(workdir: Path):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("w")
    except OSError as error:
        raise unwritable(workdir, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        words = f"workdir {workdir} is in use by another run"
        raise _refuse(workdir, words, "a directory that no other run uses") from error
    return file


def unwritable(workdir: Path, error: OSError) -> InputError:
    """Return the error of a workdir that cannot be written."""
    return _refuse(workdir, f"workdir {workdir} cannot be written: {shorten(error)}", "a writable directory")


def _refuse(workdir: Path, words: str, expected: str) -> InputError:
    return InputError(words, field="workdir", given=str(workdir), expected=expected)


def _agree(is_good: bool) -> bool:
    """Return in every process the value of the first."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(is_good))) if jax.process_count() > 1 else is_good
