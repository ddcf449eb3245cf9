"""A workdir: the one run that holds it, and the configuration of that run."""

import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import remove_leftovers, write_atomically
from mvar_jax.files.paths import as_path

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
# Keys that do not change what is learned: a run may be resumed with other values.
_CHANGEABLE_KEYS = {
    "log_every_steps",
    "eval_every_steps",
    "picture_every_steps",
    "save_every_steps",
    "keep_checkpoints",
    "keep_best",
    "profile_steps",
    "max_bad_steps",
}


def check_config(workdir: str | os.PathLike, config: dict) -> None:
    """Make the workdir and its config.json, or check that it belongs to a run of the same `config`.

    Raises InputError if a key that decides what is learned differs (nothing is written), or if the workdir cannot be
    written.
    """
    workdir = as_path(workdir, "workdir")
    path = workdir / CONFIG_FILE
    config = json.loads(json.dumps(config))
    try:
        stored = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        words = f"workdir {workdir} has no readable {CONFIG_FILE}: {shorten(error)}"
        raise _refuse(workdir, words, f"a readable {CONFIG_FILE}") from error
    if stored is not None:
        given, expected = dict(_flatten(config)), dict(_flatten(stored))
        for key in [*given, *(key for key in expected if key not in given)]:
            if given.get(key) != expected.get(key) and not _is_changeable(key):
                words = f"config.{key} is {given.get(key)!r}, but the run in {workdir} has {expected.get(key)!r}"
                raise InputError(
                    f"{words}; choose another workdir for another run",
                    field=f"config.{key}",
                    given=given.get(key),
                    expected=repr(expected.get(key)),
                )
    if config != stored and jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise _unwritable(workdir, error) from error


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
        raise _unwritable(workdir, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        words = f"workdir {workdir} is in use by another run"
        raise _refuse(workdir, words, "a directory that no other run uses") from error
    return file


def _unwritable(workdir: Path, error: OSError) -> InputError:
    return _refuse(workdir, f"workdir {workdir} cannot be written: {shorten(error)}", "a writable directory")


def _refuse(workdir: Path, words: str, expected: str) -> InputError:
    return InputError(words, field="workdir", given=str(workdir), expected=expected)


def _agree(is_good: bool) -> bool:
    """Return in every process the value of the first."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(is_good))) if jax.process_count() > 1 else is_good


def _flatten(config: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_changeable(key: str) -> bool:
    return key.startswith("mesh.") or key.rsplit(".", 1)[-1] in _CHANGEABLE_KEYS
