"""Published state dicts: where a file holds them, and the modules' fields from their shapes."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mvar_jax.convert.reader import Tensor, TorchFile
from mvar_jax.errors import InputError
from mvar_jax.scales import KNOWN_SIDES, areas_of

# names under which the published trainers store a state dict, at the top or under "trainer", and the conditioning
# that each implies
WRAPPERS = {"tokenizer": ("vae_local",), "transformer": ("mvar_wo_ddp", "var_wo_ddp")}
CONDITIONING_OF_WRAPPER = {"mvar_wo_ddp": "markov", "var_wo_ddp": "full"}
MARKERS = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
NUM_GROUPS = 32
MASK = "attn_bias_for_masking"


@dataclasses.dataclass(frozen=True)
class StateDict(Mapping):
    """The state dict of one module; a tensor is read on access.

    Attributes:
      wrapper: the key under which it was found, or None for a plain file.
      settings: command-line settings stored in a training checkpoint.
    """

    file: TorchFile
    tensors: dict[str, Tensor]
    wrapper: str | None
    settings: dict

    def __getitem__(self, name: str) -> np.ndarray:
        return self.file.read(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def sizes(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises InputError if it is missing, empty or of another rank."""
        if name not in self.tensors:
            raise self.refuse(f"tensor {name} is missing")
        shape = self.tensors[name].shape
        if len(shape) != num_axes or 0 in shape:
            raise self.refuse(f"tensor {name} must have {num_axes} axes and not be empty, got shape {list(shape)}")
        return shape

    def count(self, pattern: str) -> int:
        """Return the number of tensors whose whole name matches."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)

    def refuse(self, reason: str) -> InputError:
        """Return an InputError with the reason why the state dict cannot be converted."""
        message = f"{self.file.field}={self.file.path} cannot be converted: {reason}"
        return InputError(message, field=self.file.field, given=str(self.file.path), expected=reason)


def find_state_dict(kind: str, file: TorchFile) -> StateDict:
    """Find the state dict of a tokenizer or transformer in a published file: plain, wrapped, or in a trainer's state.

    Raises InputError if the file has no state dict, or only one of the other module.
    """
    top = file.content if isinstance(file.content, dict) else {}
    trainer = top.get("trainer")
    candidates = [(None, top)]
    for outer in (top, trainer if isinstance(trainer, dict) else {}):
        candidates += [(name, outer[name]) for name in WRAPPERS[kind] if isinstance(outer.get(name), dict)]
    found = next((candidate for candidate in candidates if MARKERS[kind] in candidate[1]), None)
    if found is None:
        other = next(name for name in MARKERS if name != kind)
        is_other = MARKERS[other] in top or any(name in top for name in WRAPPERS[other])
        hint = f"; it holds a {other}, give it as --{other}" if is_other else ""
        expected = f"a {kind}'s state dict with {MARKERS[kind]}, plain or under {' or '.join(WRAPPERS[kind])}"
        message = f"{file.field}={file.path} must hold {expected}{hint}"
        raise InputError(message, field=file.field, given=str(file.path), expected=expected)
    wrapper, tensors = found
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            message = f"{file.field}={file.path} must hold tensors by name, got {name!r}: {type(tensor).__name__}"
            raise InputError(message, field=file.field, given=str(file.path), expected="tensors by name")
    settings = top.get("args")
    return StateDict(file, dict(tensors), wrapper, settings if isinstance(settings, dict) else {})


def transformer_fields(state: StateDict, patch_nums: tuple[int, ...] | None = None) -> dict:
    """Return the fields of `Transformer` that follow from its weights, including `sides`.

    patch_nums: sides, for a file that does not determine them. Raises InputError if they contradict the file.
    """
    num_rows, width = state.sizes("class_emb.weight", 2)
    return {
        "sides": read_sides(state, patch_nums),
        "vocab_size": state.sizes("head.weight", 2)[0],
        "code_width": state.sizes("word_embed.weight", 2)[1],
        "num_classes": num_rows - 1,
        "depth": max(1, state.count(r"blocks\.\d+\.attn\.mat_qkv\.weight")),
        "width": width,
        "num_heads": state.sizes("blocks.0.attn.scale_mul_1H11", 4)[1],
        "shared_aln": "shared_ada_lin.1.weight" in state,
    }


def read_sides(state: StateDict, patch_nums: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the sides from the level of every token, else from `patch_nums`, else the known list that fits."""
    patch_nums = None if patch_nums is None else tuple(patch_nums)
    num_tokens, num_scales = state.sizes("pos_1LC", 3)[1], state.sizes("lvl_embed.weight", 2)[0]
    num_start = state.sizes("pos_start", 3)[1]
    fits = lambda sides: (len(sides), sides[0] ** 2, sum(areas_of(sides))) == (num_scales, num_start, num_tokens)
    counted = f"{num_scales} sides whose squares start with {num_start} and add up to {num_tokens}"
    if "lvl_1L" in state:
        levels = state["lvl_1L"].reshape(-1)
        areas = np.unique(levels, return_counts=True)[1]
        sides = tuple(round(side) for side in np.sqrt(areas).tolist())
        if not fits(sides) or not np.array_equal(levels, np.repeat(np.arange(num_scales), areas_of(sides))):
            raise state.refuse(f"lvl_1L must number the tokens of {counted}")
    elif patch_nums is None:
        known = [sides for sides in KNOWN_SIDES.values() if fits(sides)]
        if not known:
            message = f"give --patch_nums, the side of each token map; the file has {counted}"
            raise InputError(message, field="patch_nums", given=None, expected=counted)
        sides = known[0]
    else:
        sides = patch_nums
    if patch_nums is not None and (patch_nums != sides or not fits(sides)):
        expected = f"{sides if patch_nums != sides else counted}, as in the file"
        message = f"--patch_nums must be {expected}, got {patch_nums}"
        raise InputError(message, field="patch_nums", given=patch_nums, expected=expected)
    return sides


def window_fields(state: StateDict, sides: tuple[int, ...], given: dict) -> dict:
    """Return `conditioning`, `kernel_size` and `refine_step`, which do not follow from the weights.

    Values come from the user (`given`), else from a training checkpoint's settings, else from the published program,
    which fixes them for 256 px. Raises InputError if none of them determines a value.
    """
    conditioning = given.get("conditioning") or conditioning_of(state)
    fields = {"conditioning": conditioning}
    defaults = {}
    if sides == KNOWN_SIDES[256]:
        defaults = {"kernel_size": 7, "refine_step": 8}
    elif conditioning == "full":  # placeholders, since every scale attends in full
        defaults = {"kernel_size": 7, "refine_step": len(sides)}
    for name in ("kernel_size", "refine_step"):
        value = given.get(name)
        setting = state.settings.get(name)
        if value is None:
            value = setting if type(setting) is int else defaults.get(name)
        if value is None:
            message = f"give --{name}: it does not follow from the weights, and no value is published for {sides}"
            raise InputError(message, field=name, given=None, expected=f"--{name}")
        fields[name] = value
    return fields


def conditioning_of(state: StateDict) -> str:
    """Return markov or full by the wrapper's name; a plain file is MVAR's if its mask hides coarser scales.

    Raises InputError if neither determines it.
    """
    if state.wrapper is not None:
        return CONDITIONING_OF_WRAPPER[state.wrapper]
    if MASK in state:
        num_tokens = state.sizes(MASK, 4)[-1]
        if state[MASK].reshape(-1)[-num_tokens] < 0:  # the last token does not see the first one
            return "markov"
    message = "give --conditioning, markov (MVAR) or full (VAR): it does not follow from a plain file"
    raise InputError(message, field="conditioning", given=None, expected="markov or full")


def tokenizer_fields(state: StateDict, sides: tuple[int, ...] | None) -> dict:
    """Return the fields of `Tokenizer` that follow from its weights, and `sides`, guessed if they are None."""
    vocab_size, code_width = state.sizes("quantize.embedding.weight", 2)
    ch = state.sizes("encoder.conv_in.weight", 4)[0]
    num_levels = max(1, state.count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight"))
    widths = [state.sizes(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(num_levels)]
    for width in (ch, *widths):
        if width % ch or width % NUM_GROUPS:
            raise state.refuse(f"widths must be multiples of {ch} and of {NUM_GROUPS} groups, got {width}")
    return {
        "sides": sides or guess_sides(state),
        "vocab_size": vocab_size,
        "code_width": code_width,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": state.count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
        "num_groups": NUM_GROUPS,
        "num_phi": state.count(r"quantize\.quant_resi\.(qresi\.|qresi_ls\.\d+\.|\d+\.)weight"),
    }


def guess_sides(state: StateDict) -> tuple[int, ...]:
    """Return the one known list with as many scales as the tokenizer's code usage. Raises InputError if not one."""
    hits = "quantize.ema_vocab_hit_SV"
    num_scales = state.sizes(hits, 2)[0] if hits in state else None
    known = [(pixels, sides) for pixels, sides in KNOWN_SIDES.items() if len(sides) == num_scales]
    if len(known) == 1:
        return known[0][1]
    several = "".join(f"; {','.join(map(str, sides))} for {pixels} px" for pixels, sides in known)
    message = f"give --patch_nums, the side of each token map: it does not follow from a tokenizer alone{several}"
    raise InputError(message, field="patch_nums", given=None, expected="the side of each token map")
