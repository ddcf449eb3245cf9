"""What a run that resumes must have in common with the run that began: configuration and data.

A key is free if its field says so (`fields.FREE`): it does not change what is learned. All other keys, and the data
themselves, must stay as they were once there is a checkpoint.
"""

import dataclasses
import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mvar_jax.checkpoints.manager import has_checkpoint
from mvar_jax.checkpoints.model_directory import LINEN_FIELDS
from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import flatten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.json_files import read_json
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.sharding import make_mesh
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.settings import LoopSettings
from mvar_jax.training.task import RunOptions
from mvar_jax.training.tokenizer_step import CodebookOptions
from mvar_jax.training.transformer_step import PhaseOptions

CONFIG_FILE = "config.json"
DATA_FILE = "data_identity.json"
# The keys that name places of data. They are free because the data's identity is compared instead.
PLACE_KEYS = ("data.path", "data.cache", "data.tokenizer")
_SECTIONS = {"data": DataOptions, "optimizer": OptimizerOptions, "codebook": CodebookOptions, "phases": PhaseOptions}
_MODELS = {"tokenizer": Tokenizer, "transformer": Transformer}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a resumed run may do with a key. default: the value of a config without the key, None if it needs it."""

    is_free: bool
    default: Any = None


def rules_of(task: str | None) -> dict[str, Rule]:
    """Return the rule of every config key by its name, such as "optimizer.beta1". task: tokenizer or transformer."""
    # the initial weights are used up when the first checkpoint is written
    rules = {"task": Rule(False), "init_from": Rule(True, "")}
    for cls in (RunOptions, LoopSettings):
        rules |= _rules_of_fields(cls, "")
    for section, cls in _SECTIONS.items():
        rules |= _rules_of_fields(cls, f"{section}.")
    if task in _MODELS:
        rules |= _rules_of_fields(_MODELS[task], "model.", hidden=LINEN_FIELDS)
    # devices change the order of sums alone
    rules |= {f"mesh.{name}": Rule(True, p.default) for name, p in inspect.signature(make_mesh).parameters.items()}
    return rules


def _rules_of_fields(cls: type, prefix: str, hidden: Collection[str] = ()) -> dict[str, Rule]:
    return {
        prefix + field.name: Rule(field.metadata.get("is_free", False), _plain_default(field))
        for field in dataclasses.fields(cls)
        if field.name not in hidden
    }


def _plain_default(field: dataclasses.Field) -> Any:
    """Return a default as JSON gives it back."""
    value = None if field.default is dataclasses.MISSING else field.default
    if isinstance(value, type) or hasattr(value, "dtype"):
        return jnp.dtype(value).name
    return json.loads(json.dumps(value))


def check_resumable(workdir: Path, config: dict, data_identity: dict) -> None:
    """Raise InputError if the workdir has a checkpoint of a run of another config or of other data; write nothing.

    Args:
      workdir: the run's folder.
      config: the configuration of this run.
      data_identity: `Task.data_identity` of this run.
    """
    if not has_checkpoint(workdir):
        return
    stored = _read(workdir, CONFIG_FILE)
    changed = () if stored is None else _check_config(workdir, stored, json.loads(json.dumps(config)))
    _check_data(workdir, _read(workdir, DATA_FILE), data_identity, [key for key in changed if key in PLACE_KEYS])


def _check_config(workdir: Path, stored: dict, config: dict) -> list[str]:
    """Return the free keys that changed. Raises InputError if another one did."""
    rules, changed = rules_of(config.get("task")), []
    before, now = dict(flatten(stored)), dict(flatten(config))
    for key in [*now, *(key for key in before if key not in now)]:
        rule = rules.get(key, Rule(False))
        given, expected = now.get(key, rule.default), before.get(key, rule.default)
        if given == expected:
            continue
        if rule.is_free:
            changed.append(key)
        elif key not in now and key not in rules:
            words = f"the run in {workdir} has config.{key}={expected!r}, a key that this version does not know; "
            words += "continue with the version that began the run, or choose another workdir"
            raise InputError(words, field=f"config.{key}", given=None, expected=repr(expected))
        else:
            words = f"config.{key} is {given!r}, but the run in {workdir} has {expected!r}"
            raise InputError(
                f"{words}; choose another workdir for another run",
                field=f"config.{key}",
                given=given,
                expected=repr(expected),
            )
    return changed


def _check_data(workdir: Path, stored: dict | None, data_identity: dict, moved: list[str]) -> None:
    """Raise InputError if the data are not those of the run. moved: the keys of places that changed."""
    if stored is None:
        if not moved:  # a run of 0.1, which kept no identity, goes on with the place it names
            return
        key = f"config.{moved[0]}"
        words = (
            f"{key} changed, but the run in {workdir} was begun by a version that did not note what its data are; "
        )
        words += "resume it once with the old value, which notes it, or choose another workdir"
        raise InputError(words, field=key, expected="the value of the run")
    before, now = dict(flatten(stored)), dict(flatten(json.loads(json.dumps(data_identity))))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            words = f"config.data must name the data of the run in {workdir}: {key} is "
            words += f"{now.get(key)!r}, not {before.get(key)!r}; name the same data, or choose another workdir"
            raise InputError(words, field="config.data", given=now.get(key), expected=repr(before.get(key)))


def keep_identity(workdir: Path, config: dict, data_identity: dict) -> None:
    """Write config.json and the identity of the data, in the first process. Raises InputError if that fails."""
    if jax.process_index():
        return
    try:
        for name, content in ((CONFIG_FILE, config), (DATA_FILE, data_identity)):
            path, text = workdir / name, json.dumps(content, indent=2) + "\n"
            if not path.exists() or path.read_text() != text:
                write_atomically(path, text)
    except OSError as error:
        raise _refuse(
            workdir, f"workdir {workdir} cannot be written: {shorten(error)}", "a writable directory"
        ) from error


def _read(workdir: Path, name: str) -> dict | None:
    """Return the object of a JSON file of the workdir, None if there is no file."""
    try:
        return read_json(workdir / name, dict[str, Any])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        words = f"workdir {workdir} has no readable {name}: {shorten(error)}"
        raise _refuse(workdir, words, f"a readable {name}") from error


def _refuse(workdir: Path, words: str, expected: str) -> InputError:
    return InputError(words, field="workdir", given=str(workdir), expected=expected)
