from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch_files

import mvar_jax
from mvar_jax.convert.to_torch import to_torch
from mvar_jax.convert.weights import MisfitError, convert, load_published
from mvar_jax.errors import InputError
from mvar_jax.scales import KNOWN_SIDES
from mvar_jax.store import abstract_params, load_model, module_from_dict, save_model

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


@pytest.fixture(scope="module")
def golden():
    return {name: dict(np.load(TINY / f"{name}.npz")) for name in ("vae", "mvar")}


def make_params(module, seed=0):
    rng = np.random.default_rng(seed)
    shapes = nn.meta.unbox(abstract_params(module))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_same_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def refuse(tmp_path, tokenizer=None, transformer=None, **options):
    """The message of a refused conversion, which must leave nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert(tokenizer, transformer, tmp_path / "folder" / "model", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(tmp_path, content, name="x.pth"):
    torch_files.save(tmp_path / name, content)
    return tmp_path / name


def test_converted_model_reproduces_published_samples_and_tokens(tmp_path):
    convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "model")
    model = mvar_jax.load(tmp_path / "model")
    sampled, tokens = np.load(TINY / "sample_cfg1.0.npz"), np.load(TINY / "tokenizer.npz")
    _, ids_BL = model.sample(sampled["labels"], top_k=1, cfg=1.0)
    np.testing.assert_array_equal(ids_BL, sampled["ids"])
    images_BYX3 = 2 * tokens["image_u8"].astype(np.float32) / 255 - 1
    if images_BYX3.shape[1] == 3:
        images_BYX3 = images_BYX3.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(model.encode(images_BYX3), tokens["ids"])


def test_reads_every_size_off_published_files(tmp_path):
    modules = convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "model")
    assert modules["transformer"] == module_from_dict("transformer", TRANSFORMER | {"conditioning": "markov"})
    sizes = {"sides": SIDES, "vocab_size": 64, "code_width": 8, "ch": 32, "ch_mult": (1, 1, 2, 2, 4), "num_phi": 4}
    assert modules["tokenizer"] == module_from_dict("tokenizer", sizes)
    assert load_model(tmp_path / "model")[0] == modules


def test_either_file_converts_alone(tmp_path):
    convert(TINY / "vae.pth", None, tmp_path / "vae", patch_nums=SIDES)
    convert(None, TINY / "mvar.pth", tmp_path / "mvar")
    convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "both")
    alone, both = {}, load_model(tmp_path / "both")[1]
    for name in ("vae", "mvar"):
        alone |= load_model(tmp_path / name)[1]
    assert_same_trees(alone, both)


@pytest.mark.parametrize("wrapper", ["mvar_wo_ddp", "var_wo_ddp"])
def test_trainer_states_say_what_they_are(tmp_path, golden, wrapper):
    settings = {"kernel_size": 5, "refine_step": 9, "lr": 1e-4, "names": ["a", None, True]}
    optimizer = {"state": {0: {"exp_avg": np.ones((3, 2), np.float32)}}, "param_groups": [{"betas": (0.9, 0.95)}]}
    trainer = {
        "config": {"patch_nums": SIDES},
        wrapper: torch_files.ModuleState(golden["mvar"]),
        "vae_local": torch_files.ModuleState(golden["vae"]),
        "var_opt": optimizer,
    }
    path = save(tmp_path, {"epoch": 3, "iter": 0, "trainer": trainer, "args": settings})
    modules = convert(path, path, tmp_path / "model")
    transformer = modules["transformer"]
    assert (transformer.kernel_size, transformer.refine_step) == (5, 9)
    assert transformer.conditioning == {"mvar_wo_ddp": "markov", "var_wo_ddp": "full"}[wrapper]
    given = convert(None, path, tmp_path / "given", kernel_size=3, refine_step=4, conditioning="markov")["transformer"]
    assert (given.kernel_size, given.refine_step, given.conditioning) == (3, 4, "markov")
    convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "plain")
    assert_same_trees(load_model(tmp_path / "model")[1], load_model(tmp_path / "plain")[1])


def test_plain_transformer_is_asked_for_its_conditioning_unless_its_mask_shows_mvar(tmp_path, golden):
    assert "--conditioning" in refuse(tmp_path, transformer=TINY / "var.pth")
    modules = convert(None, TINY / "var.pth", tmp_path / "var", conditioning="full")
    assert modules["transformer"].conditioning == "full"
    modules = convert(None, save(tmp_path, golden["mvar"]), tmp_path / "mvar")
    assert modules["transformer"].conditioning == "markov"


def test_load_published_gives_var_weights_as_the_same_tree(tmp_path):
    fields, params = load_published(TINY / "var.pth")
    expected = {name: value for name, value in TRANSFORMER.items() if name not in ("kernel_size", "refine_step")}
    assert fields == expected | {"shared_aln": False}
    convert(None, TINY / "mvar.pth", tmp_path / "model")
    assert_same_trees(jax.tree.map(np.asarray, load_model(tmp_path / "model")[1]["transformer"]), params)


OTHERS = {
    "shared_adaptive": ("transformer", {"shared_aln": True, "depth": 3}, "blocks.2.ada_gss", (1, 1, 6, 64)),
    "first_map_of_4": ("transformer", {"sides": (2, 3, 5), "refine_step": 2}, "pos_start", (1, 4, 64)),
    "var": ("transformer", {"conditioning": "full"}, "blocks.1.attn.zero_k_bias", (64,)),
    "one_phi": ("tokenizer", {"num_phi": 1}, "quantize.quant_resi.qresi.weight", (4, 4, 3, 3)),
    "phi_per_scale": ("tokenizer", {"num_phi": 3}, "quantize.quant_resi.2.weight", (4, 4, 3, 3)),
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
    with mvar_jax.convert.reader.TorchFile(kind, path) as file:
        assert file.content.get("mvar_wo_ddp", file.content)[key].shape == shape
    if kind == "tokenizer":
        again = convert(path, None, tmp_path / "again", patch_nums=(1, 2, 3))
    else:
        options = {"kernel_size": 3, "refine_step": 2, "conditioning": module.conditioning}
        again = convert(None, path, tmp_path / "again", **options)
    assert again[kind].clone() == module.clone(**{name: getattr(again[kind], name) for name in ("refine_step",)
        if module is not None and kind == "transformer"})
    assert_same_trees(jax.tree.map(np.asarray, load_model(tmp_path / "again")[1][kind]), params)
