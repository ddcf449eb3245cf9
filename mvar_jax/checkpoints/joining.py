"""A tokenizer, a transformer and maybe its refiner, of one directory or joined from two."""

from pathlib import Path
from typing import Any

from mvar_jax.checkpoints.model_directory import ids_fingerprint, load_model
from mvar_jax.errors import InputError
from mvar_jax.models.networks import check_fit


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
