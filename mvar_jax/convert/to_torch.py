"""Conversion of a model directory to files of torch.save or safetensors, as published; torch is not needed."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np

from mvar_jax.checkpoints.model_directory import load_model
from mvar_jax.convert.names import to_published
from mvar_jax.convert.safetensors_files import write_safetensors
from mvar_jax.convert.sizes import CHANNELS, NUM_GROUPS, PUBLISHED_PHI, PUBLISHED_WINDOW
from mvar_jax.convert.weights import entries_of
from mvar_jax.errors import InputError
from mvar_jax.files.directories import check_new, new_directory
from mvar_jax.files.paths import as_path
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.scales import KNOWN_SIDES

SMALLEST_PHI_RATIO = 1e-6  # below it the published tokenizer has no phi
STORAGES = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.int64): b"LongStorage"}


def to_torch(checkpoint: str | os.PathLike, out: str | os.PathLike) -> list[Path]:
    """Write the modules of a model directory or workdir into `out`; return the files.

    The files are `vae.pth`, and `mvar.pth` (`{"mvar_wo_ddp": ...}`) or, for VAR, `var.pth`. Every parameter keeps its
    bits; the other buffers of the published modules are derived. Raises InputError if `checkpoint` is not a model,
    `out` is not new or empty, or the published program cannot represent the model.
    """
    out = as_path(out, "to_torch")
    check_new("to_torch", out)
    states = published_states(checkpoint)
    with new_directory("to_torch", out) as temporary:
        for name, state in states.items():
            write_torch(temporary / f"{name}.pth", {"mvar_wo_ddp": state} if name == "mvar" else state)
    return [out / f"{name}.pth" for name in states]


def to_safetensors(checkpoint: str | os.PathLike, out: str | os.PathLike, shard_mib: int | None = None) -> list[Path]:
    """Write the modules as `to_torch` does, as `vae.safetensors` and `mvar.safetensors` or `var.safetensors`.

    shard_mib: MiB of tensors in one file; a module of more becomes several files with an index, which is the first of
    those returned.
    """
    out = as_path(out, "to_safetensors")
    check_new("to_safetensors", out)
    if shard_mib is not None and (type(shard_mib) is not int or shard_mib < 1):
        expected = "a whole number of at least 1"
        message = f"--shard_mib must be {expected}, got {shard_mib!r}"
        raise InputError(message, field="shard_mib", given=shard_mib, expected=expected)
    states, names = published_states(checkpoint), []
    with new_directory("to_safetensors", out) as temporary:
        for name, state in states.items():
            names += write_safetensors(temporary, name, state, shard_mib)
    return [out / name for name in names]


def published_states(checkpoint: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Return the state dicts that the published programs would save, by name: vae, and mvar or var."""
    modules, params = load_model(as_path(checkpoint, "checkpoint"))
    states, notes = {}, []
    if "refiner" in modules:
        words = f"checkpoint {checkpoint} holds a refiner, for which the published programs have no form; "
        words += "convert the directory of its transformer"
        raise InputError(words, field="checkpoint", given=str(checkpoint), expected="no refiner")
    for kind, module in modules.items():
        state = to_published(entries_of(kind, module), jax.tree.map(np.asarray, params[kind]))
        if kind == "tokenizer":
            check_tokenizer(module)
            states["vae"] = state | tokenizer_buffers(module)
            notes += describe_tokenizer(module)
        else:
            name = "var" if module.conditioning == "full" else "mvar"
            states[name] = state | transformer_buffers(module)
            notes += describe_window(module)
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    return states


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise InputError if the published tokenizer has no option for one of the fields."""
    for name, fixed in (("num_groups", NUM_GROUPS), ("channels", CHANNELS)):
        if (given := getattr(tokenizer, name)) != fixed:
            expected = f"{fixed}, the number that the published program fixes"
            raise InputError(f"{name} must be {expected}, got {given}", field=name, given=given, expected=expected)
    if tokenizer.phi_ratio < SMALLEST_PHI_RATIO:
        expected = "above 0, since the published program has no phi then"
        message = f"phi_ratio must be {expected}, got {tokenizer.phi_ratio}"
        raise InputError(message, field="phi_ratio", given=tokenizer.phi_ratio, expected=expected)


def describe_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Return the line on what the tokenizer's file cannot hold; [] if the published program assumes it."""
    names = [name for name, value in PUBLISHED_PHI.items() if getattr(tokenizer, name) != value]
    if not names:
        return []
    option_of = {"znorm": "using_znorm", "phi_ratio": "quant_resi"}
    value_of = {name: getattr(tokenizer, name) for name in names}
    held = ", ".join(f"{name}={value}" for name, value in value_of.items())
    theirs = ", ".join(f"{option_of[name]}={value}" for name, value in value_of.items())
    ours = " ".join("--znorm" if name == "znorm" else f"--{name} {value}" for name, value in value_of.items())
    return [
        f"the tokenizer's file cannot hold {held}: pass {theirs} to VAR's VQVAE, and pass {ours} to convert it back"
    ]


def describe_window(transformer: Transformer) -> list[str]:
    """Return the line on the window, which MVAR's file cannot hold; [] if the published program assumes it."""
    window = {name: getattr(transformer, name) for name in PUBLISHED_WINDOW}
    is_assumed = transformer.sides == KNOWN_SIDES[256] and window == PUBLISHED_WINDOW
    if transformer.conditioning == "full" or is_assumed:
        return []
    sides = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    held = ", ".join(f"{name}={value}" for name, value in window.items())
    ours = " ".join(f"--{name} {sides(value)}" for name, value in window.items())
    return [
        f"the transformer's file cannot hold {held}: set them in MVAR's program, and pass {ours} to convert it back"
    ]


def tokenizer_buffers(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return the code usage, which starts at zero."""
    return {"quantize.ema_vocab_hit_SV": np.zeros((len(tokenizer.sides), tokenizer.vocab_size), np.float32)}


def transformer_buffers(transformer: Transformer) -> dict[str, np.ndarray]:
    """Return the levels, the additive mask of the published training pass, and the zero bias of the keys."""
    levels = transformer.pyramid.level_of_token().astype(np.int64)
    is_seen = levels[:, None] == levels
    if transformer.conditioning == "full":
        is_seen = levels[:, None] >= levels
    zeros = {
        f"blocks.{i}.attn.zero_k_bias": np.zeros(transformer.width, np.float32) for i in range(transformer.depth)
    }
    mask = np.where(is_seen, np.float32(0), np.float32(-np.inf))[None, None]
    return {"lvl_1L": levels[None], "attn_bias_for_masking": mask} | zeros


def write_torch(path: Path, content: dict) -> None:
    """Write nested dicts of arrays (float32 or int64) by string keys as torch.save does, without compression."""
    arrays: list[np.ndarray] = []
    pickled = pickle.PROTO + b"\x02" + pickle_value(content, arrays) + pickle.STOP
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), pickled)
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for i, array in enumerate(arrays):
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            archive.writestr(zipfile.ZipInfo(f"{root}/data/{i}"), data.tobytes())
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def pickle_value(value: dict | np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """Return the opcodes that push a value; append arrays to `arrays`, whose indices are their storage keys."""
    if isinstance(value, dict):
        items = b"".join(pickle_plain(key) + pickle_value(item, arrays) for key, item in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    arrays.append(value)
    strides = tuple(int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim))
    storage = (
        pickle.MARK
        + pickle_plain("storage")
        + (pickle.GLOBAL + b"torch\n" + STORAGES[value.dtype] + b"\n")
        + b"".join(map(pickle_plain, (str(len(arrays) - 1), "cpu", value.size)))
        + (pickle.TUPLE + pickle.BINPERSID)
    )
    no_hooks = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        (pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK)
        + storage
        + b"".join(map(pickle_plain, (0, value.shape, strides, False)))
        + no_hooks
        + (pickle.TUPLE + pickle.REDUCE)
    )


def pickle_plain(value: str | int | bool | tuple[int, ...]) -> bytes:
    """Return the opcodes of a plain value, without the header and end of a pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]
