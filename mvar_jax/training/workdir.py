"""A workdir: the one run it belongs to, the configuration of that run, files that appear whole or not at all."""

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
from mvar_jax.files.atomic import write_atomically

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
# These do not change what is learned, so a run may be resumed with other values.
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
    """Makes the workdir and its config.json, or checks that it belongs to a run of the same `config`.

    Raises:
      InputError: a key that decides what is learned differs (nothing is written), or the workdir cannot
        be written.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG_FILE
    config = json.loads(json.dumps(config))
    try:
        stored = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(
            "workdir", str(workdir), f"a directory with a readable {CONFIG_FILE} ({shorten(error)})"
        ) from error
    if stored is not None:
        given, expected = dict(_flatten(config)), dict(_flatten(stored))
        for key in [*given, *(key for key in expected if key not in given)]:
            if given.get(key) != expected.get(key) and not _is_changeable(key):
                raise InputError(
                    f"config.{key}",
                    given.get(key),
                    f"{expected.get(key)!r}, the value of the run in {workdir} (or another workdir)",
                )
    if config != stored and jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise InputError("workdir", str(workdir), f"a writable directory ({shorten(error)})") from error


@contextmanager
def hold_workdir(workdir: Path):
    """One run at a time; the lock goes with the process, however that ends. The first process holds it for all.

    Raises:
      InputError: another run holds it, or the workdir cannot be written; in every process of the run.
    """
    file, refusal = None, None
    if jax.process_index() == 0:
        try:
            file = _lock(workdir)
        except InputError as error:
            refusal = error
    if not _agree(refusal is None):
        raise refusal or InputError("workdir", str(workdir), "a directory that the first process can lock")
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
        raise InputError("workdir", str(workdir), f"a writable directory ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError("workdir", str(workdir), "a directory that no other run is using") from error
    return file


def _agree(is_good: bool) -> bool:
    """What the first process says, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(is_good))) if jax.process_count() > 1 else is_good


def _flatten(config: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_changeable(key: str) -> bool:
    return key.startswith("mesh.") or key.rsplit(".", 1)[-1] in _CHANGEABLE_KEYS
