"""A tokenizer, a transformer and maybe its refiner, of one directory or joined from several."""

from pathlib import Path
from typing import Any

from mvar_jax.checkpoints.class_names import class_names_of
from mvar_jax.checkpoints.model_directory import ids_fingerprint, load_model
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks, check_fit


def load_switched(
    directory: Path, which: str, tokenizer: Path | None, switch: int, later_directory: Path
) -> Networks:
    """Load the networks of `directory` that switch to those of `later_directory` at scale number `switch`.

    Args:
      directory, which, tokenizer: see `load_both`; both directories are loaded so.
      switch, later_directory: see `Networks.switched`.

    Raises InputError if a part is missing, or if scales, tokenizers or classes differ.
    """
    first = Networks.of(*load_both(directory, which, tokenizer))
    try:
        later = Networks.of(*load_both(later_directory, which, tokenizer))
    except InputError as error:
        message = f"switch={later_directory} cannot be loaded: {error}"
        raise InputError(message, field="switch", given=str(later_directory), expected="a model") from None
    _check_alike((directory, later_directory), (first, later))
    return first.switched(later, switch)


def _check_alike(paths: tuple[Path, Path], both: tuple[Networks, Networks]) -> None:
    """Raise InputError unless two models have the same scales, tokenizer and classes."""
    transformers: list[Any] = [networks.transformer for networks in both]
    for path, transformer in zip(paths, transformers, strict=True):
        if transformer is None:
            message = f"switch is between two transformers, but {path} holds none; name a model directory or workdir"
            raise InputError(message, field="switch", given=str(path), expected="a transformer")
    names = [class_names_of(path).names for path in paths]
    tokenizers = [ids_fingerprint(networks.tokenizer, networks.tokenizer_params) for networks in both]
    alike: dict[str, list[Any]] = {
        "scales": [transformer.sides for transformer in transformers],
        "tokenizer": [f"fingerprint {found}" for found in tokenizers],
        "number of classes": [transformer.num_classes for transformer in transformers],
        "class names": _first_difference(*names) if all(names) else [],
    }
    for what, pair in alike.items():
        if len({*pair}) > 1:
            message = f"switch={paths[1]} must have the {what} of {paths[0]}, {pair[0]}, got {pair[1]}; "
            message += "switch between models that were trained on one token cache"
            raise InputError(message, field="switch", given=pair[1], expected=str(pair[0]))


def _first_difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[str]:
    """Return both names of the first class whose names differ; [] if none do."""
    pairs = enumerate(zip(ours, theirs, strict=False))  # other numbers of classes are found before
    return next(([f"class {i} {a!r}", repr(b)] for i, (a, b) in pairs if a != b), [])


def load_both(directory: Path, which: str, tokenizer: Path | None) -> tuple[dict, dict]:
    """Load modules and parameters, both by kind: "tokenizer", "transformer" unless it stands alone, maybe "refiner".

    Args:
      directory, which: see `load_model`.
      tokenizer: directory of the tokenizer under the transformer of `directory`, of a workdir the newest checkpoint;
        None: it is in `directory` too.

    Raises InputError if a part is missing or the two do not fit together.
    """
    modules, params = load_model(directory, which)
    if tokenizer is None:
        if "tokenizer" not in modules:
            message = f"checkpoint={directory} holds no tokenizer; name its tokenizer's directory as tokenizer"
            raise InputError(message, field="checkpoint", given=str(directory), expected="a tokenizer")
        return modules, params
    try:
        others, other_params = load_model(tokenizer)
    except InputError as error:
        message = f"tokenizer={tokenizer} cannot be loaded: {error}"
        raise InputError(message, field="tokenizer", given=str(tokenizer), expected="a tokenizer") from None
    sources = ("checkpoint", directory, "transformer", modules), ("tokenizer", tokenizer, "tokenizer", others)
    for field, path, kind, found in sources:
        if kind not in found:
            message = f"{field}={path} holds no {kind}; name a model directory or workdir that holds one"
            raise InputError(message, field=field, given=str(path), expected=f"a {kind}")
    both: dict[str, Any] = {**modules, "tokenizer": others["tokenizer"]}
    try:
        check_fit(both["tokenizer"], both["transformer"])
    except InputError as error:
        message = f"tokenizer={tokenizer} does not fit the transformer in {directory}: {error}; name its own"
        raise InputError(message, field="tokenizer", given=str(tokenizer), expected="the transformer's") from None
    if "tokenizer" in modules:
        own: Any = modules["tokenizer"]
        if ids_fingerprint(own, params["tokenizer"]) != ids_fingerprint(both["tokenizer"], other_params["tokenizer"]):
            message = f"tokenizer={tokenizer} gives other ids than the tokenizer in {directory}, which its "
            message += "transformer was trained with; name that one, or one that differs in its decoder alone"
            raise InputError(message, field="tokenizer", given=str(tokenizer), expected="the transformer's")
    return both, {**params, "tokenizer": other_params["tokenizer"]}
