"""Model directories: `model.json` (what the modules are) beside Orbax weights, and a tokenizer's fingerprint."""

import dataclasses
import hashlib
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.checkpoints.best import best_step
from mvar_jax.checkpoints.manager import load_tree, restore_weights, save_tree
from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_json
from mvar_jax.models.init import abstract_params
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer

MODEL_FILE = "model.json"
CLASSES_FILE = "classes.json"  # names in the order of the labels; what a training run saw
FORMAT = 1
MODULES = {"tokenizer": Tokenizer, "transformer": Transformer}
WHICH = ("last", "best")
LINEN_FIELDS = ("name", "parent")


def module_to_dict(module: nn.Module) -> dict:
    """A module's fields as JSON values."""
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in LINEN_FIELDS}
    return {name: jnp.dtype(value).name if name == "dtype" else value for name, value in fields.items()}


def module_from_dict(kind: str, fields: dict) -> nn.Module:
    """The module of kind "tokenizer" or "transformer" with these fields.

    Raises InputError for an unknown or missing field, or fields that do not fit together.
    """
    cls = MODULES[kind]
    known = {f.name: f for f in dataclasses.fields(cls) if f.name not in LINEN_FIELDS}
    for name in fields:
        if name not in known:
            raise InputError(f"{kind}.{name}", fields[name], f"one of the fields {', '.join(sorted(known))}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in fields:
            raise InputError(f"{kind}.{name}", None, "a value: it has no default")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "dtype" in values:
        values["dtype"] = jnp.dtype(values["dtype"]).type
    module = cls(**values)
    module.check()
    return module


def write_model_file(directory: Path, modules: dict[str, nn.Module], trains: str | None = None) -> None:
    """Writes `model.json` atomically. trains: the module whose weights lie in the workdir's checkpoints."""
    content = {"format": FORMAT, "trains": trains}
    content |= {kind: module_to_dict(module) for kind, module in modules.items()}
    write_json(directory / MODEL_FILE, content)


def save_model(directory: Path, modules: dict[str, nn.Module], params: dict[str, dict]) -> None:
    """Writes a model directory: weights first, `model.json` last, so that a half-written one is no model."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind in modules:
        save_tree(directory / kind, params[kind])
    write_model_file(directory, modules)


def load_model(directory: Path, which: str = "last") -> tuple[dict[str, nn.Module], dict[str, dict]]:
    """(modules, parameters) of a model directory or a training workdir, by "tokenizer" and "transformer".

    which: of a workdir's checkpoints, "last" (the newest) or "best" (by the metric of `keep_best`); the moving
    average where it is kept. Raises InputError where the
    directory is not a model, a file is unreadable, or weights do not fit the modules.
    """
    path = directory / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "checkpoint", str(directory), f"a directory with a readable {MODEL_FILE} ({error})"
        ) from None
    if version != FORMAT:
        raise InputError("checkpoint", str(directory), f"{MODEL_FILE} of format {FORMAT}, found {version!r}")
    modules = {kind: module_from_dict(kind, content[kind]) for kind in MODULES if kind in content}
    step, params = pick_step(directory, which), {}
    for kind, module in modules.items():
        tree = restore_weights(directory, step) if content.get("trains") == kind else load_tree(directory / kind)
        check_shapes(directory, kind, module, tree)
        params[kind] = tree
    return modules, params


def pick_step(directory: Path, which: str) -> int | None:
    """The checkpoint to take, None for the newest. Raises InputError for "best" where no run kept one."""
    if which not in WHICH:
        raise InputError("which", which, f"one of {', '.join(WHICH)}")
    if which == "last":
        return None
    step = best_step(directory)
    if step is None:
        raise InputError("which", which, f"last: {directory} is no workdir of a run with keep_best")
    return step


def check_shapes(directory: Path, kind: str, module: nn.Module, tree) -> None:
    """Raises InputError naming the first parameter that is missing, unexpected or of another shape."""
    shape_of = lambda tree: {
        jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape)
        for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    wanted, found = shape_of(nn.meta.unbox(abstract_params(module))), shape_of(tree)
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            raise InputError(
                "checkpoint",
                str(directory),
                f"{kind} parameter {name} of shape {wanted.get(name)}, found {found.get(name)}",
            )


def fingerprint(tokenizer: Tokenizer, params) -> str:
    """Hex digest of a tokenizer's structure and weights: two tokenizers share ids only if these agree."""
    digest = hashlib.sha256(json.dumps(module_to_dict(tokenizer), sort_keys=True).encode())
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:32]
