"""Conversion of published PyTorch weights to a model directory, or to initial parameters of a training run."""

import dataclasses
import os
import sys
from collections.abc import Container, Iterator, Mapping

import flax.linen as nn
import numpy as np

from mvar_jax.checkpoints.model_directory import MODEL_FILE, module_from_dict, save_model
from mvar_jax.convert.names import (
    PUBLISHED_BUFFERS,
    Entry,
    find_phi_kind,
    published_shapes,
    to_tree,
    tokenizer_entries,
    transformer_entries,
)
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.sizes import FLOATS, PUBLISHED_PHI, tokenizer_fields, transformer_fields, window_fields
from mvar_jax.convert.state_dicts import StateDict, find_state_dict, is_named
from mvar_jax.errors import InputError
from mvar_jax.files.directories import check_new, new_directory
from mvar_jax.files.paths import as_path
from mvar_jax.models.init import abstract_params
from mvar_jax.models.transformer import Transformer

SHOWN_MISFITS = 3


class MisfitError(InputError):
    """Tensors that are missing, unknown, or of another shape or dtype; `misfits` has one line for each."""

    def __init__(self, state: StateDict, kind: str, misfits: list[str]):
        self.misfits = misfits
        more = f"; and {len(misfits) - SHOWN_MISFITS} more" if len(misfits) > SHOWN_MISFITS else ""
        shown = "; ".join(misfits[:SHOWN_MISFITS]) + more
        expected = f"the tensors of a {kind}"
        path, field = str(state.file.path), state.file.field
        message = f"{field}={path} does not hold {expected}: {len(misfits)} do not fit: {shown}"
        super().__init__(message, field=field, given=path, expected=expected)


@dataclasses.dataclass(frozen=True)
class AsFloat32(Mapping):
    """A state dict whose tensors are converted to float32 when they are read; `damaged` lists those not finite."""

    state: StateDict
    damaged: list[str] = dataclasses.field(default_factory=list)

    def __getitem__(self, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = self.state[name].astype(np.float32, copy=False)
        if num_bad := values.size - np.count_nonzero(np.isfinite(values)):
            self.damaged.append(f"{name} ({num_bad} of {values.size})")
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def convert(
    tokenizer_path: str | os.PathLike | None,
    transformer_path: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    patch_nums: tuple[int, ...] | None = None,
    kernel_size: int | tuple[int, ...] | None = None,
    refine_step: int | None = None,
    conditioning: str | None = None,
    znorm: bool | None = None,
    phi_ratio: float | None = None,
    weights: str | None = None,
) -> dict[str, nn.Module]:
    """Write the model directory `out` from one or two files of torch.save or of safetensors; return its modules.

    Args:
      patch_nums: side of each token map.
      kernel_size, refine_step: window side, or one per window scale, and the first window scale.
      conditioning: "markov" (MVAR) or "full" (VAR).
      znorm, phi_ratio: of the tokenizer, VAR's `using_znorm` and `quant_resi`, which no file holds.
      weights: name of the state dict to take of a file that holds several, such as "ema".

    Options that are None must follow from the files or from the published programs; what is assumed of the latter is
    printed. Raises InputError if they do not, or if a file cannot be converted, and then leaves nothing at `out`.
    """
    out = as_path(out, "out")
    check_new("out", out)
    given = {"kernel_size": kernel_size, "refine_step": refine_step, "conditioning": conditioning}
    of_tokenizer = {"znorm": znorm, "phi_ratio": phi_ratio}
    if tokenizer_path is None and transformer_path is None:
        message = "give a file for --tokenizer, --transformer, or both"
        raise InputError(message, field="tokenizer", given=None, expected="a file")
    _check_unused("transformer", transformer_path, given)
    _check_unused("tokenizer", tokenizer_path, of_tokenizer)
    modules, params, names = {}, {}, []
    assumed: dict[str, object] = {}
    if transformer_path is not None:
        with open_weights("transformer", transformer_path) as file:
            state = find_state_dict("transformer", file, weights)
            names.append(state.name)
            fields = transformer_fields(state, patch_nums)
            window, assumed = window_fields(state, fields["sides"], given)
            fields |= window
            modules["transformer"], params["transformer"] = read_module("transformer", state, fields)
        patch_nums = fields["sides"]
    if tokenizer_path is not None:
        with open_weights("tokenizer", tokenizer_path) as file:
            state = find_state_dict("tokenizer", file, weights)
            names.append(state.name)
            fields = tokenizer_fields(state, patch_nums)
            unknown = {name: PUBLISHED_PHI[name] for name, value in of_tokenizer.items() if value is None}
            fields |= of_tokenizer | unknown
            assumed |= unknown
            check_pair(state, fields, modules.get("transformer"))
            modules["tokenizer"], params["tokenizer"] = read_module("tokenizer", state, fields)
    if weights is not None and not any(is_named(name, weights) for name in names):
        listed = ", ".join(name or "plain" for name in names)
        message = f"--weights must name a state dict in the given files ({listed}), got {weights!r}"
        raise InputError(message, field="weights", given=weights, expected=listed)
    with new_directory("out", out, MODEL_FILE) as temporary:
        save_model(temporary, modules, params)
    _say_assumed(assumed)
    return modules


def _say_assumed(fields: dict[str, object]) -> None:
    if fields:
        words = ", ".join(f"{name}={value}" for name, value in fields.items())
        options = ", ".join(f"--{name}" for name in fields)
        print(f"assumed {words}; pass {options} if the model was trained otherwise", file=sys.stderr, flush=True)


def _check_unused(kind: str, path: str | os.PathLike | None, given: dict[str, object]) -> None:
    """Raise InputError for an option of a module that is not converted."""
    for name, value in given.items():
        if path is None and value is not None:
            message = f"--{name} cannot be used without --{kind}, got {value}"
            raise InputError(message, field=name, given=value, expected=f"--{kind}")


def load_published(
    path: str | os.PathLike, patch_nums: tuple[int, ...] | None = None, field: str = "transformer"
) -> tuple[dict, dict]:
    """Load a published MVAR or VAR transformer, for a run that starts from its weights. field: its name in errors.

    Returns (the fields of `Transformer` that follow from the weights: sides, vocab_size, code_width, num_classes,
    depth, width, num_heads, shared_aln; the parameter tree, float32 numpy). Raises InputError if the file cannot be
    converted.
    """
    with open_weights(field, path) as file:
        state = find_state_dict("transformer", file)
        fields = transformer_fields(state, patch_nums)
        # placeholders, since neither the window nor the conditioning changes the parameters
        whole = {"kernel_size": 1, "refine_step": len(fields["sides"])}
        return fields, read_module("transformer", state, fields | whole)[1]


def load_published_tokenizer(
    path: str | os.PathLike, sides: tuple[int, ...], field: str = "tokenizer"
) -> tuple[nn.Module, dict]:
    """Load the tokenizer of a published VAR file, for a run that starts from its weights. field: its name in errors.

    Returns (module, parameters as float32 numpy). Raises InputError if the file cannot be converted.
    """
    with open_weights(field, path) as file:
        state = find_state_dict("tokenizer", file)
        return read_module("tokenizer", state, tokenizer_fields(state, sides))


def read_module(kind: str, state: StateDict, fields: dict) -> tuple[nn.Module, dict]:
    """Return the module of these fields and its parameters.

    Raises InputError unless every tensor is used once and all values are finite.
    """
    module = module_from_dict(kind, fields)
    entries = entries_of(kind, module, state)
    wanted = published_shapes(entries, nn.meta.unbox(abstract_params(module)))
    if misfits := find_misfits(wanted, state):
        raise MisfitError(state, kind, misfits)
    for name in state:
        if name.endswith("zero_k_bias") and np.any(state[name]):
            raise state.refuse(f"{name} must be zero, since keys have no bias")
    doubles = [name for name in wanted if state.tensors[name].dtype == "float64"]
    if doubles:
        words = f"{state.file.field}={state.file.path}: {len(doubles)} float64 tensors are rounded to float32"
        print(words, file=sys.stderr, flush=True)
    values = AsFloat32(state)
    tree = to_tree(entries, values)
    if values.damaged:
        more = f" and {len(values.damaged) - SHOWN_MISFITS} more" if len(values.damaged) > SHOWN_MISFITS else ""
        shown = ", ".join(values.damaged[:SHOWN_MISFITS]) + more
        raise state.refuse(f"values are NaN or infinite as float32 in {shown}")
    return module, tree


def entries_of(kind: str, module: nn.Module, names: Container[str] = ()) -> list[Entry]:
    """Return the table between the published tensors and the parameters of a "tokenizer" or "transformer".

    names: of the tensors of a file that is read; () for the names that the published program gives.
    """
    if kind == "transformer":
        return transformer_entries(module.depth, module.num_heads, module.shared_aln)
    num_scales, phi_kind = len(module.sides), find_phi_kind(names)
    return tokenizer_entries(module.ch_mult, module.num_res_blocks, module.num_phi, num_scales, phi_kind)


def find_misfits(wanted: dict[str, tuple[int, ...]], state: StateDict) -> list[str]:
    """Return one line for each tensor that is missing, unknown, or of another shape or a non-float dtype."""
    misfits = []
    for name in [*wanted, *(name for name in state if name not in wanted)]:
        tensor = state.tensors.get(name)
        if tensor is None:
            misfits.append(f"{name} {wanted[name]} is missing")
        elif name not in wanted:
            if not name.endswith(PUBLISHED_BUFFERS):
                misfits.append(f"{name!a} {tensor.shape} is unknown")
        elif tensor.shape != wanted[name]:
            misfits.append(f"{name} {wanted[name]} has shape {tensor.shape}")
        elif tensor.dtype not in FLOATS:
            misfits.append(f"{name} {wanted[name]} is {tensor.dtype}, not one of {', '.join(FLOATS)}")
    return misfits


def check_pair(state: StateDict, fields: dict, transformer: Transformer | None) -> None:
    """Raise InputError unless tokenizer and transformer have the same codebook sizes."""
    for name in ("vocab_size", "code_width"):
        if transformer is not None and fields[name] != getattr(transformer, name):
            expected = getattr(transformer, name)
            raise state.refuse(f"{name} must be {expected} as in the transformer, got {fields[name]}")
