import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch_files

import mvar_jax
from mvar_jax.checkpoints.model_directory import load_model, module_from_dict, save_model
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.to_torch import to_torch
from mvar_jax.convert.weights import MisfitError, convert, load_published
from mvar_jax.errors import InputError, RunError
from mvar_jax.models.init import abstract_params
from mvar_jax.scales import KNOWN_SIDES

TINY = Path(__file__).parent.parent / "golden" / "tiny"
SIDES = KNOWN_SIDES[256]
TRANSFORMER = {
    "sides": SIDES,
    "refine_step": 8,
    "kernel_size": 7,
    "vocab_size": 64,
    "code_width": 8,
    "num_classes": 10,
    "depth": 2,
    "width": 64,
    "num_heads": 2,
}


@pytest.fixture
def golden():
    return {name: dict(np.load(TINY / f"{name}.npz")) for name in ("vae", "mvar")}


@pytest.fixture
def states(golden):
    """The golden states and VAR's, which has the same weights and its own mask."""
    with open_weights("transformer", TINY / "var.pth") as file:
        return golden | {"var": {name: file.read(tensor).copy() for name, tensor in file.content.items()}}


def make_params(module, seed=0):
    rng = np.random.default_rng(seed)
    shapes = nn.meta.unbox(abstract_params(module))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_same_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def refusal(tmp_path, tokenizer=None, transformer=None, **options) -> InputError:
    """Return the error of a refused conversion, which must leave nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert(tokenizer, transformer, tmp_path / "folder" / "model", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return caught.value


def refuse(*arguments, **options) -> str:
    return str(refusal(*arguments, **options))


def save(tmp_path, content, name="x.pth"):
    torch_files.save(tmp_path / name, content)
    return tmp_path / name


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Directory of the tiny tokenizer and transformer."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(TINY / "vae.pth", TINY / "mvar.pth", out)
    return out


def test_converted_model_reproduces_published_samples_and_tokens(converted):
    model = mvar_jax.load(converted)
    sampled, tokens = np.load(TINY / "sample_cfg1.0.npz"), np.load(TINY / "tokenizer.npz")
    # Greedy ids are those, and only those, that are the likeliest ones when they are fed back themselves.
    likeliest_BL = model.logits(sampled["ids"], sampled["labels"]).argmax(-1)
    np.testing.assert_array_equal(likeliest_BL, sampled["ids"])
    images_BYX3 = 2 * tokens["image_u8"].astype(np.float32).transpose(0, 2, 3, 1) / 255 - 1
    np.testing.assert_array_equal(model.encode(images_BYX3), tokens["ids"])


def test_reads_every_size_off_published_files(converted):
    modules, _ = load_model(converted)
    assert modules["transformer"] == module_from_dict("transformer", TRANSFORMER | {"conditioning": "markov"})
    sizes = {"sides": SIDES, "vocab_size": 64, "code_width": 8, "ch": 32, "ch_mult": (1, 1, 2, 2, 4), "num_phi": 4}
    assert modules["tokenizer"] == module_from_dict("tokenizer", sizes)


def test_either_file_converts_alone(tmp_path, golden, converted):
    path = save(tmp_path, {"trainer": {"vae_local": torch_files.ModuleState(golden["vae"])}})
    convert(path, None, tmp_path / "vae", patch_nums=SIDES)
    convert(None, TINY / "mvar.pth", tmp_path / "mvar")
    alone = load_model(tmp_path / "vae")[1] | load_model(tmp_path / "mvar")[1]
    assert_same_trees(alone, load_model(converted)[1])


@pytest.mark.parametrize("wrapper", ["mvar_wo_ddp", "var_wo_ddp"])
def test_trainer_states_determine_window_and_conditioning(tmp_path, golden, converted, wrapper):
    settings = {"kernel_size": 5, "refine_step": 9, "lr": 1e-4, "names": ["a", None, True]}
    optimizer = {"state": {0: {"exp_avg": np.ones((3, 2), np.float32)}}, "param_groups": [{"betas": (0.9, 0.95)}]}
    trainer = {"config": {"patch_nums": SIDES}, wrapper: torch_files.ModuleState(golden["mvar"]), "opt": optimizer}
    path = save(tmp_path, {"epoch": 3, "iter": 0, "trainer": trainer, "args": settings})
    transformer = convert(None, path, tmp_path / "model")["transformer"]
    assert (transformer.kernel_size, transformer.refine_step) == (5, 9)
    assert transformer.conditioning == {"mvar_wo_ddp": "markov", "var_wo_ddp": "full"}[wrapper]
    given = convert(None, path, tmp_path / "given", kernel_size=3, refine_step=4, conditioning="markov")[
        "transformer"
    ]
    assert (given.kernel_size, given.refine_step, given.conditioning) == (3, 4, "markov")
    assert_same_trees(load_model(tmp_path / "model")[1]["transformer"], load_model(converted)[1]["transformer"])


def test_plain_transformer_needs_a_conditioning_unless_its_mask_shows_mvar(tmp_path, golden):
    assert "--conditioning" in refuse(tmp_path, transformer=TINY / "var.pth")
    modules = convert(None, TINY / "var.pth", tmp_path / "var", conditioning="full")
    assert modules["transformer"].conditioning == "full"
    modules = convert(None, save(tmp_path, golden["mvar"]), tmp_path / "mvar")
    assert modules["transformer"].conditioning == "markov"


@pytest.mark.parametrize(
    ("name", "wrap", "given", "shown"),
    [
        ("mvar", lambda state: state, "full", "markov"),
        ("mvar", lambda state: {"mvar_wo_ddp": state}, "full", "markov"),
        ("var", lambda state: state, "markov", "full"),
        ("var", lambda state: {"trainer": {"var_wo_ddp": state}}, "markov", "full"),
        ("var", lambda state: {"model": state}, "markov", "full"),
        ("mvar", lambda state: state, "half", "markov"),
    ],
)
def test_a_conditioning_that_the_mask_contradicts_is_refused(tmp_path, states, name, wrap, given, shown):
    error = refusal(tmp_path, transformer=save(tmp_path, wrap(states[name])), conditioning=given)
    assert error.field == "conditioning" and error.given == given
    assert f"--conditioning must be {shown}, as attn_bias_for_masking in " in str(error) and f"got {given}" in str(
        error
    )


def test_a_mask_that_is_left_over_from_var_decides_nothing(tmp_path, states):
    """MVAR that was fine-tuned from VAR may hold its mask: the trainer's name counts, alone or asked for."""
    path = save(tmp_path, {"mvar_wo_ddp": states["var"]})
    for given in (None, "markov"):
        module = convert(None, path, tmp_path / str(given), conditioning=given)["transformer"]
        assert module.conditioning == "markov"
    message = refuse(tmp_path, transformer=save(tmp_path, states["var"]))
    assert "give --conditioning full if it is VAR" in message and "remove the mask" in message
    del states["var"]["attn_bias_for_masking"]
    for given in ("markov", "full"):
        module = convert(None, save(tmp_path, states["var"]), tmp_path / f"plain_{given}", conditioning=given)
        assert module["transformer"].conditioning == given


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "name"), [("vae", "encoder.conv_in.bias"), ("mvar", "blocks.1.ffn.fc2.weight")])
def test_values_that_are_not_finite_are_refused_by_name_and_number(tmp_path, states, kind, name, value):
    states[kind][name].reshape(-1)[[0, 5]] = value
    path = save(tmp_path, states[kind])
    paths = (path, None) if kind == "vae" else (None, path)
    message = refuse(tmp_path, *paths, patch_nums=SIDES)
    assert f"NaN or infinite as float32 in {name} (2 of {states[kind][name].size})" in message
    if kind == "mvar":
        with pytest.raises(InputError, match="NaN or infinite"):
            load_published(path)


def test_many_tensors_that_are_not_finite_are_counted(tmp_path, states):
    state = {name: np.full_like(x, np.nan) if name.endswith("bias") else x for name, x in states["mvar"].items()}
    del state["blocks.0.attn.zero_k_bias"], state["blocks.1.attn.zero_k_bias"]
    damaged = [name for name in state if name.endswith("bias")]
    message = refuse(tmp_path, transformer=save(tmp_path, state))
    assert f"and {len(damaged) - 3} more" in message


def test_doubles_are_rounded_and_it_is_said(tmp_path, states, capsys):
    states["mvar"]["head.weight"] = states["mvar"]["head.weight"].astype(np.float64) * (1 + 1e-12)
    _, params = load_published(save(tmp_path, states["mvar"]))
    expected = states["mvar"]["head.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["head"]["kernel"], expected, strict=True)
    assert "1 float64 tensors are rounded to float32" in capsys.readouterr().err
    states["mvar"]["head.weight"][0, 0] = 1e300  # finite, but not as float32
    assert "head.weight (1 of " in refuse(tmp_path, transformer=save(tmp_path, states["mvar"]))


def test_load_published_gives_var_weights_as_the_same_tree(converted):
    fields, params = load_published(TINY / "var.pth")
    expected = {name: value for name, value in TRANSFORMER.items() if name not in ("kernel_size", "refine_step")}
    assert fields == expected | {"shared_aln": False}
    assert_same_trees(params, jax.tree.map(np.asarray, load_model(converted)[1]["transformer"]))


OTHERS = {
    "shared_adaptive": ("transformer", {"shared_aln": True, "depth": 3}, "blocks.2.ada_gss", (1, 1, 6, 64)),
    "first_map_of_4": ("transformer", {"sides": (2, 3, 5), "refine_step": 2}, "pos_start", (1, 4, 64)),
    "var": ("transformer", {"conditioning": "full"}, "blocks.1.attn.zero_k_bias", (64,)),
    "one_phi": ("tokenizer", {"num_phi": 1}, "quantize.quant_resi.qresi.weight", (4, 4, 3, 3)),
    "phi_per_scale": ("tokenizer", {"num_phi": 3}, "quantize.quant_resi.2.weight", (4, 4, 3, 3)),
    "phi_per_scale_of_4": (
        "tokenizer",
        {"num_phi": 4, "sides": (1, 2, 3, 4)},
        "quantize.quant_resi.qresi_ls.3.bias",
        (4,),
    ),
    "two_phi": ("tokenizer", {"num_phi": 2}, "quantize.quant_resi.qresi_ls.1.bias", (4,)),
    "three_blocks": ("tokenizer", {"num_res_blocks": 3}, "decoder.up.1.block.3.conv1.weight", (64, 64, 3, 3)),
    "one_level": ("tokenizer", {"ch_mult": (2,)}, "decoder.up.0.attn.2.qkv.weight", (192, 64, 1, 1)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_structures_go_to_torch_and_back(tmp_path, case):
    kind, changed, key, shape = OTHERS[case]
    base = TRANSFORMER | {"sides": (1, 2, 3), "refine_step": 2, "kernel_size": 3}
    if kind == "tokenizer":
        base = {"sides": (1, 2, 3), "vocab_size": 16, "code_width": 4, "ch": 32, "ch_mult": (1, 2), "num_phi": 2}
    module = module_from_dict(kind, base | changed)
    params = make_params(module)
    save_model(tmp_path / "model", {kind: module}, {kind: params})
    (path,) = to_torch(tmp_path / "model", tmp_path / "torch")
    with open_weights(kind, path) as file:
        assert file.content.get("mvar_wo_ddp", file.content)[key].shape == shape
    if kind == "tokenizer":
        again = convert(path, None, tmp_path / "again", patch_nums=module.sides)
    else:
        options = {"kernel_size": 3, "refine_step": 2, "conditioning": module.conditioning}
        again = convert(None, path, tmp_path / "again", **options)
    assert again[kind] == module
    assert_same_trees(jax.tree.map(np.asarray, load_model(tmp_path / "again")[1][kind]), params)


@pytest.mark.parametrize("names", ["qresi_ls.{}", "{}"])
def test_phi_of_a_tokenizer_are_found_by_either_names(tmp_path, golden, names):
    """VAR's VQVAE names four phi of four scales by its option share_quant_resi, 4 or 0."""
    rename = lambda name: re.sub(r"qresi_ls\.(\d)", lambda found: names.format(found[1]), name)
    state = {rename(name): value for name, value in golden["vae"].items()}
    state["quantize.ema_vocab_hit_SV"] = state["quantize.ema_vocab_hit_SV"][:4]
    modules = convert(save(tmp_path, state), None, tmp_path / "model", patch_nums=(1, 2, 4, 8))
    assert modules["tokenizer"].num_phi == 4
    params = load_model(tmp_path / "model")[1]["tokenizer"]
    for i in range(4):
        expected = golden["vae"][f"quantize.quant_resi.qresi_ls.{i}.bias"]
        np.testing.assert_array_equal(params[f"phi_convs_{i}"]["bias"], expected)


def test_options_of_a_tokenizer_that_no_file_holds_are_recorded(tmp_path, capsys):
    convert(TINY / "vae.pth", None, tmp_path / "model", patch_nums=SIDES, znorm=True, phi_ratio=0.25)
    tokenizer = load_model(tmp_path / "model")[0]["tokenizer"]
    assert (tokenizer.znorm, tokenizer.phi_ratio) == (True, 0.25)
    assert "assumed" not in capsys.readouterr().err


def test_what_is_assumed_is_said(tmp_path, golden, capsys):
    said = lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith("assumed ")]
    convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "both")
    words = "assumed kernel_size=7, refine_step=8, znorm=False, phi_ratio=0.5; "
    options = "pass --kernel_size, --refine_step, --znorm, --phi_ratio"
    assert said() == [f"{words}{options} if the model was trained otherwise"]
    convert(None, TINY / "mvar.pth", tmp_path / "window", kernel_size=5)
    assert said() == ["assumed refine_step=8; pass --refine_step if the model was trained otherwise"]
    convert(None, TINY / "var.pth", tmp_path / "var", conditioning="full")  # it has no window
    state = {"trainer": {"mvar_wo_ddp": golden["mvar"]}, "args": {"kernel_size": 5, "refine_step": 9}}
    convert(None, save(tmp_path, state), tmp_path / "trainer")
    assert said() == []


def test_tokenizer_of_other_channels_is_refused(tmp_path, golden):
    golden["vae"]["encoder.conv_in.weight"] = golden["vae"]["encoder.conv_in.weight"][:, :1]
    assert "has 3 channels, got 1" in refuse(tmp_path, save(tmp_path, golden["vae"]), patch_nums=SIDES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_widened(tmp_path, golden, dtype):
    is_kept = lambda name: name == "lvl_1L" or name == "attn_bias_for_masking"
    halves = {name: x if is_kept(name) else x.astype(dtype) for name, x in golden["mvar"].items()}
    _, params = load_published(save(tmp_path, halves))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["head"]["kernel"], halves["head.weight"].T.astype(np.float32), strict=True)


@pytest.mark.parametrize("kind", ["mvar", "vae"])
def test_every_missing_extra_and_misshapen_tensor_is_listed(tmp_path, golden, kind):
    state = golden[kind]
    first, second, third, fourth = [name for name in state if name.endswith(("bias", "weight"))][-4:]
    del state[first]
    state[second] = state[second][..., :-1]
    state[third] = state[third].astype(np.int32)
    state[f"{fourth}_copy"] = np.ones((2, 5), np.float32)
    paths = (save(tmp_path, state), None) if kind == "vae" else (None, save(tmp_path, {"mvar_wo_ddp": state}))
    with pytest.raises(MisfitError) as caught:
        convert(*paths, tmp_path / "model", patch_nums=SIDES)
    shape = golden[kind][second].shape
    wanted = {
        first: "is missing",
        second: f"has shape {shape}",
        third: "int32",
        f"{fourth}_copy": "(2, 5) is unknown",
    }
    assert len(caught.value.misfits) == 4
    for name, what in wanted.items():
        (line,) = [line for line in caught.value.misfits if name in line.replace("'", " ").split()]
        assert what in line
    assert "4 do not fit" in str(caught.value) and "and 1 more" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_key_bias_that_is_not_zero_is_refused(tmp_path, golden):
    golden["mvar"]["blocks.1.attn.zero_k_bias"][3] = 1e-3
    assert "blocks.1.attn.zero_k_bias" in refuse(tmp_path, transformer=save(tmp_path, golden["mvar"]))


def test_sides_come_from_levels_or_the_known_list_or_the_option(tmp_path, golden):
    """Each source of `sides` is used if those before it are absent; an option that contradicts the file is refused.

    A file without levels and of no known length needs --patch_nums; a wrong one must not give a model silently.
    """
    state = golden["mvar"]
    levels = state.pop("lvl_1L")
    for given in (None, SIDES, list(SIDES)):
        assert load_published(save(tmp_path, state), given)[0]["sides"] == SIDES
    for name in ("pos_1LC", "lvl_embed.weight"):  # without the last two maps
        state[name] = state[name][:, :255] if name == "pos_1LC" else state[name][:8]
    path = save(tmp_path, {"mvar_wo_ddp": state})
    assert "--patch_nums" in refuse(tmp_path, transformer=path)
    assert "255" in refuse(tmp_path, transformer=path, patch_nums=SIDES[:7])
    options = {"patch_nums": SIDES[:8], "refine_step": 8}
    assert "--kernel_size" in refuse(tmp_path, transformer=path, **options)
    assert convert(None, path, tmp_path / "asked", kernel_size=7, **options)["transformer"].sides == SIDES[:8]
    path = save(tmp_path, {"mvar_wo_ddp": state | {"lvl_1L": levels[:, :255]}})
    assert "--kernel_size" in refuse(tmp_path, transformer=path)
    assert "--refine_step" in refuse(tmp_path, transformer=path, kernel_size=7)
    assert "as in the file" in refuse(tmp_path, transformer=path, patch_nums=(*SIDES[:7], 11))
    assert convert(None, path, tmp_path / "read", kernel_size=7, refine_step=8)["transformer"].sides == SIDES[:8]


@pytest.mark.parametrize("change", [lambda x: x[:, ::-1], lambda x: x + 1, lambda x: x[:, :-1], lambda x: x * 0])
def test_levels_that_number_no_square_maps_are_refused(tmp_path, golden, change):
    golden["mvar"]["lvl_1L"] = change(golden["mvar"]["lvl_1L"])
    assert "lvl_1L" in refuse(tmp_path, transformer=save(tmp_path, golden["mvar"]))


def test_tokenizer_alone_needs_sides_unless_one_list_fits(tmp_path, golden):
    message = refuse(tmp_path, tokenizer=TINY / "vae.pth")
    assert "--patch_nums" in message and "256 px" in message and "512 px" in message
    hits = np.zeros((14, 64), np.float32)
    path = save(tmp_path, golden["vae"] | {"quantize.ema_vocab_hit_SV": hits})
    assert convert(path, None, tmp_path / "model")["tokenizer"].sides == KNOWN_SIDES[1024]
    path = save(tmp_path, {name: x for name, x in golden["vae"].items() if "ema_vocab" not in name})
    assert "--patch_nums" in refuse(tmp_path, tokenizer=path)


def test_files_of_the_other_module_are_named(tmp_path):
    assert "it holds a transformer" in refuse(tmp_path, tokenizer=TINY / "mvar.pth")
    assert "it holds a tokenizer" in refuse(tmp_path, transformer=TINY / "vae.pth")
    assert "state dict" in refuse(tmp_path, transformer=save(tmp_path, [1, 2]))


def test_tokenizer_of_other_codes_than_the_transformer_is_refused(tmp_path, golden):
    golden["vae"]["quantize.embedding.weight"] = np.zeros((63, 8), np.float32)
    message = refuse(tmp_path, save(tmp_path, golden["vae"]), TINY / "mvar.pth")
    assert "vocab_size must be 64 as in the transformer, got 63" in message


def test_tokenizer_of_other_than_32_groups_is_refused(tmp_path, golden):
    golden["vae"]["encoder.conv_in.weight"] = np.zeros((16, 3, 3, 3), np.float32)
    assert "32 groups" in refuse(tmp_path, save(tmp_path, golden["vae"]), patch_nums=SIDES)


def test_number_of_blocks_is_bounded(tmp_path, golden):
    """Two small numbers of names give a product of blocks, each of which would be traced."""
    names = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(5, 40)]
    names += [f"encoder.down.0.block.{i}.conv1.weight" for i in range(2, 40)]
    state = golden["vae"] | dict.fromkeys(names, golden["vae"]["encoder.down.0.block.0.conv1.weight"])
    assert "at most 100 blocks, got 40 x 40" in refuse(tmp_path, save(tmp_path, state), patch_nums=SIDES)


@pytest.mark.parametrize(
    ("name", "rows"), [("head.weight", 0), ("class_emb.weight", None), ("blocks.0.attn.scale_mul_1H11", None)]
)
def test_tensors_that_give_sizes_are_required(tmp_path, golden, name, rows):
    golden["mvar"][name] = golden["mvar"][name][:rows] if rows is not None else np.zeros(3, np.float32)
    assert name in refuse(tmp_path, transformer=save(tmp_path, golden["mvar"]))
    del golden["mvar"][name]
    assert name in refuse(tmp_path, transformer=save(tmp_path, golden["mvar"]))


def test_options_without_meaning_or_sense_are_refused(tmp_path):
    assert "--tokenizer" in refuse(tmp_path)
    for name, value in {"kernel_size": 7, "refine_step": 8, "conditioning": "markov"}.items():
        assert refusal(tmp_path, TINY / "vae.pth", patch_nums=SIDES, **{name: value}).field == name
    for name, value in {"znorm": True, "phi_ratio": 0.25}.items():
        assert refusal(tmp_path, None, TINY / "mvar.pth", **{name: value}).field == name
    for name, value in {"kernel_size": 4, "refine_step": 11, "conditioning": "half"}.items():
        assert refusal(tmp_path, transformer=TINY / "mvar.pth", **{name: value}).field == name
    assert refusal(tmp_path, TINY / "vae.pth", patch_nums=SIDES, phi_ratio=1.5).field == "tokenizer.phi_ratio"
    assert "strictly increasing" in refuse(tmp_path, TINY / "vae.pth", patch_nums=(3, 2))


def test_a_directory_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="new or (an )?empty directory"):
            convert(None, TINY / "mvar.pth", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    convert(None, TINY / "mvar.pth", tmp_path / "empty")
    assert "transformer" in load_model(tmp_path / "empty")[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, error):
    def write_half(directory, modules, params):
        (directory / "half").write_text("")
        raise error

    monkeypatch.setattr("mvar_jax.convert.weights.save_model", write_half)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        convert(None, TINY / "mvar.pth", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
