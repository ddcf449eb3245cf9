"""What a run that resumes must have in common with the run that began: configuration and data.

A key is free if its field says so (`fields.FREE`): it does not change what is learned. All other keys, and the data
themselves, must stay as they were once there is a checkpoint, but for two changes on purpose, which config.json
notes: a larger num_steps of a run that has reached its end, and the keys that `--allow_change` names.
"""

import dataclasses
import datetime
import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mvar_jax.checkpoints.manager import has_checkpoint
from mvar_jax.checkpoints.model_directory import fingerprint, ids_fingerprint, load_part
from mvar_jax.checkpoints.steps import checkpoint_folder, list_steps
from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import check_keys, flatten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.json_files import read_json
from mvar_jax.models.init import LINEN_FIELDS
from mvar_jax.models.refiner import Refiner
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.sharding import MESH_AXES, make_mesh
from mvar_jax.training.adversary import AdversaryOptions
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.settings import LoopSettings
from mvar_jax.training.task import RunOptions
from mvar_jax.training.transformer_step import PhaseOptions

CONFIG_FILE = "config.json"
DATA_FILE = "data_identity.json"
# The keys that name places of data. They are free because the data's identity is compared instead.
PLACE_KEYS = ("data.path", "data.cache", "data.tokenizer")
# Keys of config.json that no config has: changes of the run so far, and the ARG of --config FILE:ARG.
NOTES = ("history", "config_arg")
# What a run may change on purpose: its checkpoints and its model fit any value.
_CHANGEABLE = ("num_steps", "batch_size")
_CHANGEABLE_SECTIONS = ("optimizer", "codebook", "phases", "adversary")
# keys of these sections that decide on the shapes of what a checkpoint holds
_SHAPES = ("codebook.simvq", "adversary.kind", "adversary.layers", "adversary.width")
_SECTIONS = {
    "data": DataOptions,
    "optimizer": OptimizerOptions,
    "codebook": CodebookOptions,
    "adversary": AdversaryOptions,
    "phases": PhaseOptions,
}
_MODELS = {"tokenizer": Tokenizer, "transformer": Transformer, "refiner": Refiner}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a resumed run may do with a key.

    Attributes:
      is_free: the key may change.
      default: the value of a config without the key, None if it needs it.
      may_change: `--allow_change` may name the key.
    """

    is_free: bool
    default: Any = None
    may_change: bool = False


def rules_of(task: str | None) -> dict[str, Rule]:
    """Return the rule of every config key by its name, such as "optimizer.beta1". task: of the config."""
    # the initial weights are used up when the first checkpoint is written; those under a refiner are compared as data
    rules = {"task": Rule(False), "init_from": Rule(True, ""), "train_parts": Rule(False, "all")}
    for cls in (RunOptions, LoopSettings):
        rules |= _rules_of_fields(cls, "")
    for section, cls in _SECTIONS.items():
        rules |= _rules_of_fields(cls, f"{section}.")
    if task in _MODELS:
        rules |= _rules_of_fields(_MODELS[task], "model.", hidden=LINEN_FIELDS)
    # devices change the order of sums alone
    parameters = inspect.signature(make_mesh).parameters
    rules |= {f"mesh.{name}": Rule(True, parameters[name].default) for name in MESH_AXES}
    return rules


def _rules_of_fields(cls: type, prefix: str, hidden: Collection[str] = ()) -> dict[str, Rule]:
    return {
        prefix + field.name: Rule(
            field.metadata.get("is_free", False),
            _plain_default(field),
            prefix + field.name in _CHANGEABLE
            or (prefix.removesuffix(".") in _CHANGEABLE_SECTIONS and prefix + field.name not in _SHAPES),
        )
        for field in dataclasses.fields(cls)
        if field.name not in hidden
    }


def _plain_default(field: dataclasses.Field) -> Any:
    """Return a default as JSON gives it back."""
    value = None if field.default is dataclasses.MISSING else field.default
    if isinstance(value, type) or hasattr(value, "dtype"):
        return jnp.dtype(value).name
    return json.loads(json.dumps(value))


def check_allowed(keys: Collection[str], task: str) -> None:
    """Raise InputError for a key that `--allow_change` may not name. task: of the config."""
    rules = rules_of(task)
    check_keys(dict.fromkeys(keys), rules, "config")
    for key in keys:
        if not (rules[key].is_free or rules[key].may_change):
            allowed = f"{', '.join(_CHANGEABLE)} or a key of {', '.join(_CHANGEABLE_SECTIONS)}"
            words = f"--allow_change must name {allowed}, got {key}, which cannot change in a run; "
            raise InputError(f"{words}choose another workdir", field="allow_change", given=key, expected=allowed)


def check_resumable(
    workdir: Path, config: dict, data_identity: dict, allowed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Raise InputError if the workdir has a checkpoint of a run of another config or of other data; write nothing.

    Args:
      workdir: the run's folder.
      config: the configuration of this run.
      data_identity: `Task.data_identity` of this run.
      allowed: keys that may change although they change what is learned.

    Returns the changes of such keys for `keep_identity`: step of the newest checkpoint, key, from and to.
    """
    if not has_checkpoint(workdir):
        return []
    stored, stored_data = _read(workdir, CONFIG_FILE), _read(workdir, DATA_FILE)
    if stored_data is not None and (config.get("epochs") or config.get("optimizer", {}).get("warmup_epochs")):
        _check_data(workdir, stored_data, data_identity, [])  # before the steps, which follow from their number
    free, changes = ([], []) if stored is None else _check_config(workdir, stored, _as_json(config), allowed)
    _check_data(workdir, stored_data, data_identity, [key for key in free if key in PLACE_KEYS])
    return changes


def config_of_run(workdir: Path) -> dict[str, Any]:
    """Return the config of the run in a workdir, {} if it is unknown."""
    return _read(workdir, CONFIG_FILE) or {}


def _as_json(content: dict) -> dict:
    return json.loads(json.dumps(content))


def _check_config(workdir: Path, stored: dict, config: dict, allowed: Collection[str]) -> tuple[list, list]:
    """Return (free keys that changed, allowed changes of others). Raises InputError if more changed."""
    rules, free, changes, refused = rules_of(config.get("task")), [], [], []
    before, now = (dict(flatten({k: v for k, v in c.items() if k not in NOTES})) for c in (stored, config))
    newest = max(list_steps(checkpoint_folder(workdir)), default=0)
    for key in [*now, *(key for key in before if key not in now)]:
        rule = rules.get(key, Rule(False))
        given, expected = now.get(key, rule.default), before.get(key, rule.default)
        if given == expected:
            continue
        if rule.is_free:
            free.append(key)
        elif key not in now and key not in rules:
            words = f"the run in {workdir} has config.{key}={expected!r}, a key that this version does not know; "
            words += "continue with the version that began the run, or choose another workdir"
            raise InputError(words, field=f"config.{key}", given=None, expected=repr(expected))
        elif key in allowed or _extends(key, given, expected, newest):
            changes.append({"step": newest, "key": key, "from": expected, "to": given})
        else:
            refused.append((key, given, expected))
    if refused:
        may_change = lambda change: rules.get(change[0], Rule(False)).may_change
        key, given, expected = min(refused, key=may_change)  # first one that no option permits
        advice = "choose another workdir for another run"
        if all(map(may_change, refused)):
            keys = ",".join(key for key, *_ in refused)
            advice = f"pass --allow_change={keys} to go on with it, or choose another workdir"
        words = f"config.{key} is {given!r}, but the run in {workdir} has {expected!r}; {advice}"
        raise InputError(words, field=f"config.{key}", given=given, expected=repr(expected))
    for change in changes:
        _check_change(workdir, newest, change)
    return free, changes


def _extends(key: str, given: Any, expected: Any, newest: int) -> bool:
    """Return whether a change is a larger num_steps of a run that has reached its end."""
    return key == "num_steps" and newest >= expected < given


def _check_change(workdir: Path, newest: int, change: dict) -> None:
    """Raise InputError if the checkpoints of the run do not fit an allowed change."""
    key, before, given, expected = change["key"], change["from"], change["to"], None
    if key == "num_steps" and given < newest:
        expected = f"at least {newest}, the step that the run in {workdir} has reached"
    elif key == "optimizer.ema_decay" and (given > 0) != (before > 0):
        expected = "above 0, since" if before else "0, since"
        expected += f" the checkpoints in {workdir} hold {'an' if before else 'no'} average of the weights"
    if expected is not None:
        words = f"config.{key} must be {expected}, got {given}"
        raise InputError(words, field=f"config.{key}", given=given, expected=expected)


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
    before, now = dict(flatten(stored)), dict(flatten(_as_json(data_identity)))
    if any(before.get(key, now[key]) != now[key] for key in now if key.endswith("tokenizer")):
        before = _ids_of_own_tokenizer(workdir, before) | before
    # what one side does not know is compared by the config; a validation split may come and go
    both = before.keys() & now.keys()
    for key in sorted(both, key=lambda key: (not key.endswith(".num_items"), key)):
        if before[key] != now[key] and f"{key}_ids" not in both:  # a tokenizer's decoder may change
            difference = _describe_difference(key, before[key], now[key])
            words = f"config.data must name the data of the run in {workdir}, {difference}; "
            words += "name the same data, or choose another workdir"
            raise InputError(words, field="config.data", given=now[key], expected=repr(before[key]))


def _ids_of_own_tokenizer(workdir: Path, identity: dict[str, Any]) -> dict[str, str]:
    """Return the fingerprint of ids for each whole tokenizer's fingerprint in an identity that the workdir's has."""
    try:
        tokenizer, params = load_part(workdir, "tokenizer")
    except InputError:
        return {}
    whole, ids = fingerprint(tokenizer, params), ids_fingerprint(tokenizer, params)
    return {f"{key}_ids": ids for key, value in identity.items() if key.endswith("tokenizer") and value == whole}


def _describe_difference(key: str, before: Any, now: Any) -> str:
    """Return how a value of the data's identity differs, as a relative clause."""
    split, _, name = key.partition(".")
    if name == "num_items":
        return f"which had {before:,} {split} images, not {now:,}"
    if name in ("classes", "names", "files"):
        return f"whose {split} images had other {'classes' if name == 'classes' else 'names'}"
    if name.startswith("files_of_shards."):
        return f"whose token cache was made of other {split} images: files had other names, sizes or labels"
    return f"whose {key} is {before!r}, not {now!r}"


def describe_change(num_images: int | None, step: int, key: str, **ends) -> str:
    """Return a change of `check_resumable` as a line. num_images: of an epoch, None if they are not known."""
    line = f"from step {step} on, config.{key} is {ends['to']!r} instead of {ends['from']!r}"
    if key == "num_steps":
        line += f"; learning rate and weight decay follow their schedules over {ends['to']} steps"
    if key == "batch_size":
        place, word = step * ends["to"], "skipped" if ends["to"] > ends["from"] else "repeated"
        where = f"{place:,} images"
        if num_images:
            where = f"{place % num_images:,} of the {num_images:,} images of epoch {place // num_images + 1:,}"
        line += f"; the stream goes on after {where}, as if all steps had had this size, so images are {word}"
    return line


def keep_identity(workdir: Path, config: dict, data_identity: dict, changes: Sequence[dict] = ()) -> None:
    """Write config.json and the identity of the data, in the first process. Raises InputError if that fails.

    changes: see `check_resumable`; config.json keeps them, and those of earlier starts, as `history`.
    """
    if jax.process_index():
        return
    history = (_read(workdir, CONFIG_FILE) or {}).get("history", []) if has_checkpoint(workdir) else []
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    history = [*history, *({"time": now, **change} for change in changes)]
    config = config | ({"history": history} if history else {})
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
