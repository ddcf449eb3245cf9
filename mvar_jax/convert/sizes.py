"""What a published state dict says about its model: which dict it is, and the modules' fields from the shapes."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mvar_jax.convert.reader import Tensor, TorchFile
from mvar_jax.errors import InputError
from mvar_jax.scales import KNOWN_SIDES, areas_of

# The names under which the published trainers keep a state dict, at the top or under "trainer", and what the
# transformers under them were trained as.
WRAPPERS = {"tokenizer": ("vae_local",), "transformer": ("mvar_wo_ddp", "var_wo_ddp")}
CONDITIONING_OF_WRAPPER = {"mvar_wo_ddp": "markov", "var_wo_ddp": "full"}
MARKERS = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
NUM_GROUPS = 32
MASK = "attn_bias_for_masking"


@dataclasses.dataclass(frozen=True)
class StateDict(Mapping):
    """The state dict of one module; a tensor is read when it is asked for.

    wrapper: the name it was found under, None for a plain file. settings: what a training checkpoint keeps of
    its command line.
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
        """Shape of a tensor. Raises InputError where it is missing, empty or of another rank."""
        if name not in self.tensors:
            raise self.refuse(f"a tensor {name}, found none")
        shape = self.tensors[name].shape
        if len(shape) != num_axes or 0 in shape:
            raise self.refuse(f"a tensor {name} of {num_axes} axes, found shape {shape}")
        return shape

    def count(self, pattern: str) -> int:
        """Number of tensors whose whole name matches."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)

    def refuse(self, expected: str) -> InputError:
        return InputError(self.file.field, str(self.file.path), expected)


def find_state_dict(kind: str, file: TorchFile) -> StateDict:
    """The state dict of a tokenizer or transformer in a published file: plain, wrapped, or in a trainer's state.

    Raises InputError where there is none, or where it is the other module's.
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
        places, hint = " or ".join(WRAPPERS[kind]), f"; it holds a {other}" if is_other else ""
        expected = f"a {kind}'s state dict, plain or under {places}, with {MARKERS[kind]}{hint}"
        raise InputError(file.field, str(file.path), expected)
    wrapper, tensors = found
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise InputError(
                file.field, str(file.path), f"tensors by name, found {name!r} of {type(tensor).__name__}"
            )
    settings = top.get("args")
    return StateDict(file, dict(tensors), wrapper, settings if isinstance(settings, dict) else {})


def transformer_fields(state: StateDict, patch_nums: tuple[int, ...] | None = None) -> dict:
    """The fields of `Transformer` that its weights decide, `sides` among them.

    patch_nums: sides, for a file that does not decide them. Raises InputError.
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
    """Sides from the level of every token, else the known list of that many tokens, else `patch_nums`."""
    patch_nums = None if patch_nums is None else tuple(patch_nums)
    num_tokens, num_scales = state.sizes("pos_1LC", 3)[1], state.sizes("lvl_embed.weight", 2)[0]
    num_start = state.sizes("pos_start", 3)[1]
    fits = lambda sides: (len(sides), sides[0] ** 2, sum(areas_of(sides))) == (num_scales, num_start, num_tokens)
    counted = f"{num_scales} sides, the first squared {num_start}, their squares adding up to {num_tokens}"
    if "lvl_1L" in state:
        levels = state["lvl_1L"].reshape(-1)
        areas = np.unique(levels, return_counts=True)[1]
        sides = tuple(round(side) for side in np.sqrt(areas).tolist())
        if not fits(sides) or not np.array_equal(levels, np.repeat(np.arange(num_scales), areas_of(sides))):
            raise state.refuse(f"lvl_1L to number the maps of {counted}")
    elif patch_nums is None:
        known = [sides for sides in KNOWN_SIDES.values() if fits(sides)]
        if not known:
            raise InputError("patch_nums", None, f"--patch_nums, the side of each token map: {counted}")
        sides = known[0]
    else:
        sides = patch_nums
    if patch_nums is not None and (patch_nums != sides or not fits(sides)):
        raise InputError("patch_nums", patch_nums, f"{sides if patch_nums != sides else counted}, as in the file")
    return sides


def window_fields(state: StateDict, sides: tuple[int, ...], given: dict) -> dict:
    """`conditioning`, `kernel_size` and `refine_step`, which no weight shows.

    given: those that the user gave. The rest comes from a training checkpoint's settings or is what the
    published program fixes (its 256 px list); anything else is asked for. Raises InputError.
    """
    conditioning = given.get("conditioning") or conditioning_of(state)
    fields = {"conditioning": conditioning}
    defaults = {}
    if sides == KNOWN_SIDES[256]:
        defaults = {"kernel_size": 7, "refine_step": 8}
    elif conditioning == "full":  # every scale is seen in full, so that these are only placeholders
        defaults = {"kernel_size": 7, "refine_step": len(sides)}
    for name in ("kernel_size", "refine_step"):
        value = given.get(name)
        setting = state.settings.get(name)
        if value is None:
            value = setting if type(setting) is int else defaults.get(name)
        if value is None:
            expected = f"--{name}, which the weights do not show and the published programs do not fix for {sides}"
            raise InputError(name, None, expected)
        fields[name] = value
    return fields


def conditioning_of(state: StateDict) -> str:
    """Markov or full, by the trainer's name for it; a plain file is MVAR's if its mask hides coarser scales."""
    if state.wrapper is not None:
        return CONDITIONING_OF_WRAPPER[state.wrapper]
    if MASK in state:
        num_tokens = state.sizes(MASK, 4)[-1]
        if state[MASK].reshape(-1)[-num_tokens] < 0:  # the last token does not see the first one
            return "markov"
    raise InputError("conditioning", None, "--conditioning markov (MVAR) or full (VAR): a plain file does not say")


def tokenizer_fields(state: StateDict, sides: tuple[int, ...] | None) -> dict:
    """The fields of `Tokenizer` that its weights decide, and `sides` where they are not given."""
    vocab_size, code_width = state.sizes("quantize.embedding.weight", 2)
    ch = state.sizes("encoder.conv_in.weight", 4)[0]
    num_levels = max(1, state.count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight"))
    widths = [state.sizes(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(num_levels)]
    for width in (ch, *widths):
        if width % ch or width % NUM_GROUPS:
            raise state.refuse(f"widths that are multiples of {ch} and of {NUM_GROUPS} groups, found {width}")
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
    """The one known list with as many scales as the tokenizer counted code usage for."""
    hits = "quantize.ema_vocab_hit_SV"
    num_scales = state.sizes(hits, 2)[0] if hits in state else None
    known = [(pixels, sides) for pixels, sides in KNOWN_SIDES.items() if len(sides) == num_scales]
    if len(known) == 1:
        return known[0][1]
    several = "".join(f"; {','.join(map(str, sides))} for {pixels} px" for pixels, sides in known)
    raise InputError(
        "patch_nums", None, f"--patch_nums, the side of each token map: a tokenizer alone does not say{several}"
    )
