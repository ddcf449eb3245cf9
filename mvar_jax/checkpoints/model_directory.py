"""Model directories: `model.json`, which describes the modules, and Orbax weights; fingerprints of modules."""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.checkpoints.best import best_step
from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.checkpoints.trees import load_tree, save_tree
from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import from_dict, put_below
from mvar_jax.files.atomic import write_json
from mvar_jax.files.json_files import read_json
from mvar_jax.models.init import LINEN_FIELDS, abstract_params
from mvar_jax.models.networks import check_fit
from mvar_jax.models.refiner import Refiner, check_base
from mvar_jax.models.tokenizer import Tokenizer, fold_codebook, ids_params
from mvar_jax.models.transformer import Transformer

MODEL_FILE = "model.json"
CLASSES_FILE = "classes.json"  # class names in the order of the labels, as training saw them
FORMATS = (1, 2)  # 2: with a refiner, which earlier versions would leave out
MODULES = {"tokenizer": Tokenizer, "transformer": Transformer, "refiner": Refiner}
WHICH = ("last", "best")
# fields that a module's fingerprint leaves out
UNTOLD: dict[type, tuple[str, ...]] = {
    Tokenizer: ("precision", "remat", "channels"),
    Transformer: ("precision",),
    Refiner: ("precision",),
}
IDS_FREE = (*UNTOLD[Tokenizer], "beta")  # fields of a tokenizer that no id depends on, but for rounding
DTYPES = ("float32", "bfloat16", "float16")


class TransformerFields(TypedDict):
    """The field of a transformer that its class names need; `from_dict` checks the others."""

    num_classes: int


class ModelFile(TypedDict):
    """The content of `model.json`; each module's fields are those of its class."""

    format: int
    trains: NotRequired[Literal["tokenizer", "transformer", "refiner"] | None]
    tokenizer: NotRequired[dict[str, Any]]
    transformer: NotRequired[TransformerFields]
    refiner: NotRequired[dict[str, Any]]
    refiner_base: NotRequired[str]


def module_to_dict(module: nn.Module) -> dict:
    """Return a module's fields as JSON values."""
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in LINEN_FIELDS}
    return {name: jnp.dtype(value).name if name == "dtype" else value for name, value in fields.items()}


def module_from_dict(kind: str, fields: dict, where: str | None = None) -> nn.Module:
    """Return the module of a kind of MODULES with these fields.

    where: what a user calls `fields`, such as "config.model"; None: they are those of model.json or of published
    weights. Raises InputError for an unknown or missing field, or fields that do not fit together.
    """
    if "dtype" in fields:
        fields = fields | {"dtype": _dtype_of(fields["dtype"], where or kind)}
    module = from_dict(MODULES[kind], fields, where or kind, hidden=LINEN_FIELDS)
    try:
        module.check()
    except InputError as error:
        if where is None:
            raise
        raise put_below(error, where) from None
    return module


def _dtype_of(given: Any, where: str) -> Any:
    if given not in DTYPES:
        expected = f"one of {', '.join(DTYPES)}"
        message = f"{where}.dtype must be {expected}, got {given!r}"
        raise InputError(message, field=f"{where}.dtype", given=given, expected=expected)
    return jnp.dtype(given).type


def write_model_file(
    directory: Path, modules: dict[str, nn.Module], trains: str | None = None, base: str | None = None
) -> None:
    """Write `model.json` atomically.

    Args:
      directory: the model directory or workdir.
      modules: what it holds.
      trains: the module whose weights are in the workdir's checkpoints.
      base: fingerprint of the transformer that the refiner was trained on, if there is one.
    """
    content: dict[str, object] = {"format": FORMATS["refiner" in modules], "trains": trains}
    content |= {kind: module_to_dict(module) for kind, module in modules.items()}
    content |= {"refiner_base": base} if "refiner" in modules else {}
    write_json(directory / MODEL_FILE, content)


def save_model(directory: Path, modules: dict[str, nn.Module], params: dict[str, dict]) -> None:
    """Write a model directory: weights first, `model.json` last, so a half-written one is no model."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind in modules:
        save_tree(directory / kind, params[kind])
    base = fingerprint(modules["transformer"], params["transformer"]) if "refiner" in modules else None
    write_model_file(directory, modules, base=base)


def load_model(directory: Path, which: str = "last") -> tuple[dict[str, nn.Module], dict[str, dict]]:
    """Load a model directory or a training workdir: (modules, parameters), both by the keys of MODULES.

    which: a workdir's checkpoint, "last" (the newest) or "best" (by the metric of `keep_best`). Its moving average is
    loaded if there is one. Raises InputError if the directory is not a model, a file is unreadable, or weights do not
    fit the modules.
    """
    content = read_model_file(directory)
    try:
        modules: dict[str, Any] = {kind: module_from_dict(kind, content[kind]) for kind in MODULES if kind in content}
    except InputError as error:
        raise _refuse(directory, f"has a {MODEL_FILE} that cannot be used: {error}") from None
    if {"tokenizer", "transformer"} <= modules.keys():
        try:
            check_fit(modules["tokenizer"], modules["transformer"])
        except InputError as error:
            words = f"holds a transformer that does not fit its tokenizer: {error}; join two that were made together"
            raise _refuse(directory, words) from None
    if "refiner" in modules and "transformer" not in modules:
        raise _refuse(directory, "holds a refiner without its transformer")
    step, params = pick_step(directory, which), {}
    for kind, module in modules.items():
        is_trained = content.get("trains") == kind
        tree = fold_codebook(restore_weights(directory, step)) if is_trained else load_tree(directory / kind)
        check_shapes(directory, kind, module, tree)
        check_finite(directory, kind, tree)
        params[kind] = tree
    if "refiner" in modules:
        check_refiner(directory, modules, params["transformer"], content.get("refiner_base"))
    return modules, params


def load_part(directory: Path, kind: str) -> tuple[Any, dict]:
    """Load the module and the parameters of `kind` that a directory holds beside its checkpoints.

    Raises InputError if it has none, or they are damaged.
    """
    fields = read_model_file(directory).get(kind)
    if fields is None:
        raise _refuse(directory, f"holds no {kind}")
    module = module_from_dict(kind, fields)
    tree = load_tree(directory / kind)
    check_shapes(directory, kind, module, tree)
    return module, tree


def check_refiner(directory: Path, modules: dict[str, Any], transformer_params: Any, base: str | None) -> None:
    """Raise InputError unless a refiner was trained on this transformer; base: the fingerprint of the one it was."""
    try:
        check_base(modules["refiner"], modules["transformer"])
    except InputError as error:
        raise _refuse(directory, f"holds a refiner that does not fit its transformer: {error}") from None
    found = fingerprint(modules["transformer"], transformer_params)
    if found != base:
        words = f"holds a refiner of another transformer: its base has fingerprint {base}, this one {found}"
        raise _refuse(directory, f"{words}; train it again with task refiner, or put its own transformer back")


def read_model_file(directory: Path) -> Any:
    """Return the content of `model.json`, a `ModelFile`. Raises InputError if it is missing or damaged."""
    try:
        content = read_json(directory / MODEL_FILE, ModelFile)
    except (OSError, ValueError) as error:
        raise _refuse(directory, f"has no readable {MODEL_FILE}: {shorten(error)}") from None
    if (version := content["format"]) not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise _refuse(directory, f"has a {MODEL_FILE} of format {version!r}; this version reads formats {known}")
    return content


def pick_step(directory: Path, which: str) -> int | None:
    """Return the step of the checkpoint to load, None for the newest. Raises InputError if there is no best one."""
    if which not in WHICH:
        expected = " or ".join(WHICH)
        raise InputError(f"which must be {expected}, got {which!r}", field="which", given=which, expected=expected)
    if which == "last":
        return None
    step = best_step(directory)
    if step is None:
        words = f"{directory} has no best checkpoint; train with keep_best or pass which='last'"
        raise InputError(words, field="which", given=which, expected="last")
    return step


def check_shapes(directory: Path, kind: str, module: nn.Module, tree) -> None:
    """Raise InputError for the first parameter that is missing, unexpected or of another shape."""
    shape_of = lambda tree: {
        jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape)
        for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    wanted, found = shape_of(nn.meta.unbox(abstract_params(module))), shape_of(tree)
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            raise _refuse(directory, f"must have {kind} {name} of shape {wanted.get(name)}, got {found.get(name)}")


def check_finite(directory: Path, kind: str, tree) -> None:
    """Raise InputError for the first parameter with NaN or infinite values."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # the sum reads the weights once and makes no copy; it may overflow, so it only says where to look
        with np.errstate(all="ignore"):
            if np.isfinite(np.sum(weights := np.asarray(leaf))):
                continue
        if num_bad := weights.size - int(np.isfinite(weights).sum()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            words = f"holds {num_bad} weights that are NaN or infinite, in {kind} {name}"
            raise _refuse(directory, f"{words}; load an earlier checkpoint or make it again")


def fingerprint(module: nn.Module, params) -> str:
    """Return a hex digest of a module's structure and weights: equal ones compute the same images and numbers.

    Fields that decide on rounding alone are not part of it, but those of a transformer that older samples name. Nor
    are `channels`, which the kernels tell.
    """
    return _digest(module, UNTOLD[type(module)], params)


def ids_fingerprint(tokenizer: Tokenizer, params) -> str:
    """Return a hex digest of what a tokenizer's ids and f_hat depend on, which leaves the decoder out.

    Token caches and transformers belong to all tokenizers with the same digest.
    """
    return _digest(tokenizer, IDS_FREE, ids_params(params))


def _digest(module: nn.Module, without: Collection[str], params) -> str:
    structure = {name: value for name, value in module_to_dict(module).items() if name not in without}
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:32]


def _refuse(directory: Path, reason: str) -> InputError:
    words = f"checkpoint {directory} {reason}"
    return InputError(words, field="checkpoint", given=str(directory), expected="a model directory or a workdir")
