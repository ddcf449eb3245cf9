"""The modules' fields from the shapes of a published state dict."""

import numpy as np

from mvar_jax.convert.state_dicts import StateDict
from mvar_jax.errors import InputError, show
from mvar_jax.scales import KNOWN_SIDES, areas_of

CONDITIONING_OF_WRAPPER = {"mvar_wo_ddp": "markov", "var_wo_ddp": "full"}
NUM_GROUPS = 32
MAX_BLOCKS = 100  # of the encoder; the published tokenizer has 10
MASK = "attn_bias_for_masking"
PUBLISHED_WINDOW = {"kernel_size": 7, "refine_step": 8}  # for 256 px
PUBLISHED_PHI = {"znorm": False, "phi_ratio": 0.5}
CHANNELS = 3
FLOATS = ("float32", "float16", "bfloat16", "float64")


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


def window_fields(state: StateDict, sides: tuple[int, ...], given: dict) -> tuple[dict, dict]:
    """Return `conditioning`, `kernel_size` and `refine_step`, which do not follow from the weights.

    The second dict holds those of them that are assumed, since neither the user nor the file gives them.

    Values come from the user (`given`), else from a training checkpoint's settings, else from the published program,
    which fixes them for 256 px. Raises InputError if none of them determines a value.
    """
    conditioning = conditioning_of(state, given.get("conditioning"))
    fields = {"conditioning": conditioning}
    assumed, defaults = {}, {}
    if sides == KNOWN_SIDES[256]:
        defaults = PUBLISHED_WINDOW
    elif conditioning == "full":  # placeholders, since every scale attends in full
        defaults = {"kernel_size": 7, "refine_step": len(sides)}
    for name in ("kernel_size", "refine_step"):
        value = given.get(name)
        setting = state.settings.get(name)
        if value is None and setting is not None and type(setting) is not int:
            message = f"give --{name}: the file says {show(setting)}, which is no whole number"
            raise InputError(message, field=name, given=setting, expected=f"--{name}")
        if value is None:
            value = defaults.get(name) if setting is None else setting
            if setting is None and conditioning != "full":
                assumed[name] = value
        if value is None:
            message = f"give --{name}: it does not follow from the weights, and no value is published for {sides}"
            raise InputError(message, field=name, given=None, expected=f"--{name}")
        fields[name] = value
    return fields, assumed


def conditioning_of(state: StateDict, given: str | None) -> str:
    """Return markov or full: as `given`, else by a published trainer's name, else markov if the mask is MVAR's.

    The mask of a file may be left over: MVAR that was fine-tuned from VAR's file holds VAR's. So a trainer's name
    counts more, and VAR's mask in a plain file decides nothing.

    Raises InputError if nothing determines it, or if `given` contradicts the mask and is no trainer's name either.
    """
    shown = conditioning_of_mask(state)
    named = CONDITIONING_OF_WRAPPER.get(state.name.rpartition(".")[2])
    place = f"{MASK} in {state.file.field}={state.file.path}"
    if None not in (given, shown) and given not in (shown, named):
        message = f"--conditioning must be {shown}, as {place} says, got {given}; remove the mask if it is left over"
        raise InputError(message, field="conditioning", given=given, expected=shown)
    if found := given or named or ("markov" if shown == "markov" else None):
        return found
    message = "give --conditioning, markov (MVAR) or full (VAR): it does not follow from a plain file"
    if shown:
        message = f"give --conditioning full if it is VAR, as {place} says; remove the mask if it is left over"
    raise InputError(message, field="conditioning", given=None, expected="markov or full")


def conditioning_of_mask(state: StateDict) -> str | None:
    """Return markov if the published mask hides the first scale from the last one, full if not, None if it tells not.

    With one scale both are the same.
    """
    if MASK not in state or state.tensors[MASK].dtype not in FLOATS or state.sizes("lvl_embed.weight", 2)[0] == 1:
        return None
    state.sizes(MASK, 4)
    bias = state[MASK][-1, -1, -1, 0]
    return "markov" if bias < 0 else "full" if bias == 0 else None


def tokenizer_fields(state: StateDict, sides: tuple[int, ...] | None) -> dict:
    """Return the fields of `Tokenizer` that follow from its weights, and `sides`, guessed if they are None."""
    vocab_size, code_width = state.sizes("quantize.embedding.weight", 2)
    ch, channels = state.sizes("encoder.conv_in.weight", 4)[:2]
    if channels != CHANNELS:
        raise state.refuse(f"the published tokenizer has {CHANNELS} channels, got {channels}")
    num_levels = max(1, state.count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight"))
    num_res_blocks = state.count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    if num_levels * num_res_blocks > MAX_BLOCKS:
        raise state.refuse(f"an encoder has at most {MAX_BLOCKS} blocks, got {num_levels} x {num_res_blocks}")
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
        "num_res_blocks": num_res_blocks,
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
