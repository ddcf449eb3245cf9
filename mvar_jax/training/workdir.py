"""A workdir: the configuration of its run."""

import json
import os
from pathlib import Path

import jax

from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import flatten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.paths import as_path

CONFIG_FILE = "config.json"
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
        given, expected = dict(flatten(config)), dict(flatten(stored))
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


def _unwritable(workdir: Path, error: OSError) -> InputError:
    return _refuse(workdir, f"workdir {workdir} cannot be written: {shorten(error)}", "a writable directory")


def _refuse(workdir: Path, words: str, expected: str) -> InputError:
    return InputError(words, field="workdir", given=str(workdir), expected=expected)


def _is_changeable(key: str) -> bool:
    return key.startswith("mesh.") or key.rsplit(".", 1)[-1] in _CHANGEABLE_KEYS
