"""A tokenizer and a transformer in two directories, and the options of the model that commands share."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from PIL import Image
from test_bad_input import refuse

import mvar_jax
from mvar_jax.__main__ import main, make_parser
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.cli.models import load_as_asked
from mvar_jax.errors import InputError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the tiny model's tokenizer and transformer alone, and of a tokenizer with more codes."""
    root, params = tmp_path_factory.mktemp("parts"), small_case.tiny_params()
    for kind, module in small_case.TINY_MODULES.items():
        save_model(root / kind, {kind: module}, {kind: params[kind]})
    larger = small_case.TINY_MODULES["tokenizer"].clone(vocab_size=32)
    save_model(root / "larger", {"tokenizer": larger}, {"tokenizer": small_case.seeded_params(larger)})
    return root


def test_a_joined_model_is_the_whole_one(parts, tiny_model, quick_programs):
    joined, whole = mvar_jax.load(parts / "transformer", tokenizer=parts / "tokenizer"), mvar_jax.load(tiny_model)
    np.testing.assert_array_equal(joined.sample([0, 2], cfg=1.0)[0], whole.sample([0, 2], cfg=1.0)[0])


def test_a_tokenizer_takes_the_place_of_the_models_own(parts, tiny_model, tmp_path):
    other, own = small_case.TINY_MODULES["tokenizer"], small_case.tiny_params()["tokenizer"]
    seeded = small_case.seeded_params(other, seed=9)
    for name, params in (("decoder", own | {"decoder": seeded["decoder"]}), ("other", seeded)):
        save_model(tmp_path / name, {"tokenizer": other}, {"tokenizer": params})
    kernel = lambda model: np.asarray(model.tokenizer_params["decoder"]["conv_in"]["kernel"])
    joined = kernel(mvar_jax.load(tiny_model, tokenizer=tmp_path / "decoder"))
    np.testing.assert_array_equal(joined, kernel(mvar_jax.load(tmp_path / "decoder")))
    assert (joined != kernel(mvar_jax.load(tiny_model))).any()
    with pytest.raises(InputError, match="gives other ids than the tokenizer in .*tiny_model"):
        mvar_jax.load(tiny_model, tokenizer=tmp_path / "other")


@pytest.mark.parametrize(
    ("checkpoint", "tokenizer", "field", "words"),
    [
        ("transformer", None, "checkpoint", "holds no tokenizer; name its tokenizer's directory as tokenizer"),
        ("transformer", "transformer", "tokenizer", "holds no tokenizer; name a model directory"),
        ("tokenizer", "tokenizer", "checkpoint", "holds no transformer; name a model directory"),
        ("transformer", "none", "tokenizer", "none"),
        ("transformer", "larger", "tokenizer", "does not fit the transformer in .*: vocab_size must be 32 "),
    ],
)
def test_parts_that_make_no_model_are_refused_by_name(parts, checkpoint, tokenizer, field, words):
    with pytest.raises(InputError, match=words) as caught:
        mvar_jax.load(parts / checkpoint, tokenizer=tokenizer and parts / tokenizer)
    assert caught.value.field == field and str(parts / (tokenizer or checkpoint)) in str(caught.value)


def test_sample_and_edit_take_a_tokenizer_beside_the_checkpoint(parts, quick_programs, tmp_path, capfd):
    Image.new("RGB", (6, 6)).save(tmp_path / "image.png")
    sample = ["sample", "--labels", "1", "--num", "1"]
    edit = ["edit", "--label", "1", "--num", "1", "--image", str(tmp_path / "image.png"), "--expand", "2"]
    for command in (sample, edit):
        command += ["--checkpoint", str(parts / "transformer"), "--out", str(tmp_path / command[0])]
        refuse(capfd, command, "checkpoint", "holds no tokenizer")
        refuse(capfd, [*command, "--tokenizer", str(parts / "larger")], "tokenizer=", "vocab_size must be 32")
        assert not (tmp_path / command[0]).exists()
        assert main([*command, "--tokenizer", str(parts / "tokenizer")]) == 0
        assert (tmp_path / command[0] / "000000.png").exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of models to switch to: one that shares the tiny model's tokenizer, and some that do not fit."""
    root, params = tmp_path_factory.mktemp("others"), small_case.tiny_params()
    tokenizer, transformer = small_case.TINY_MODULES["tokenizer"], small_case.TINY_MODULES["transformer"]
    small, scales = transformer.clone(depth=1), {"sides": (1, 2, 3)}
    changes = {
        "small": (tokenizer, small, 0.5),
        "retrained": (tokenizer, small, 0.6),
        "scales": (tokenizer.clone(**scales), small.clone(**scales), 0.5),
        "classes": (tokenizer, small.clone(num_classes=4), 0.5),
    }
    for name, (*both, std) in changes.items():
        modules = dict(zip(("tokenizer", "transformer"), both, strict=True))
        save_model(root / name, modules, {kind: small_case.seeded_params(x, std=std) for kind, x in modules.items()})
    shutil.copytree(root / "small", root / "named")
    (root / "named" / "classes.json").write_text('["ant", "bee", "fly"]')
    save_model(root / "alone", {"tokenizer": tokenizer}, {"tokenizer": params["tokenizer"]})
    return root


def test_a_switched_model_draws_with_both(tiny_model, others, quick_programs):
    first, other, both = (
        mvar_jax.load(path, switch=switch)
        for path, switch in ((tiny_model, None), (others / "small", None), (tiny_model, (1, others / "small")))
    )
    ids = [model.sample([0, 2], cfg=1.0)[1] for model in (first, other, both)]
    np.testing.assert_array_equal(ids[2][:, :1], ids[0][:, :1])
    assert (ids[2][:, 1:] != ids[0][:, 1:]).any()


@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [
        ("small", 3, "switch must be .*a number of scales from 0 to 2, got 3"),
        ("scales", 1, r"must have the scales of .*, \(1, 3\), got \(1, 2, 3\); switch between"),
        ("retrained", 1, "must have the tokenizer of .*, fingerprint [0-9a-f]{32}, got fingerprint [0-9a-f]{32};"),
        ("classes", 1, "must have the number of classes of .*, 3, got 4"),
        ("alone", 1, "is between two transformers, but .*alone holds none; name"),
        ("none", 1, "switch=.*none cannot be loaded: "),
    ],
)
def test_models_that_do_not_fit_are_not_switched(tiny_model, others, name, scale, words):
    with pytest.raises(InputError, match=words) as caught:
        mvar_jax.load(tiny_model, switch=(scale, others / name))
    assert caught.value.field == "switch" and "\n" not in str(caught.value)


def test_classes_of_other_names_are_not_switched(others):
    mvar_jax.load(others / "small", switch=(1, others / "named"))  # names that one of both lacks
    shutil.copytree(others / "named", others / "renamed")
    (others / "renamed" / "classes.json").write_text('["ant", "bug", "fly"]')
    with pytest.raises(InputError, match="must have the class names of .*, class 1 'bee', got 'bug'"):
        mvar_jax.load(others / "named", switch=(1, others / "renamed"))


def test_sample_notes_the_switch_and_edit_takes_it(tiny_model, others, quick_programs, tmp_path, capfd):
    Image.new("RGB", (6, 6)).save(tmp_path / "image.png")
    sample = ["sample", "--labels", "1", "--num", "1"]
    edit = ["edit", "--label", "1", "--num", "1", "--image", str(tmp_path / "image.png"), "--expand", "2"]
    for command in (sample, edit):
        command += ["--checkpoint", str(tiny_model), "--out", str(tmp_path / command[0])]
        for wrong in ("small", f"x:{others}", "1:"):
            refuse(capfd, [*command, "--switch", wrong], "--switch must be SCALE:DIR, such as 8:models/mvar-d16")
        refuse(capfd, [*command, "--switch", f"1:{others / 'retrained'}"], "must have the tokenizer of")
        assert not (tmp_path / command[0]).exists()
        assert main([*command, "--switch", f"1:{others / 'small'}"]) == 0
        refuse(capfd, command, "switch=None", "used for")
    noted = json.loads((tmp_path / "sample" / "samples.json").read_text())
    assert noted["switch"].startswith("1: weights ")
    refuse(capfd, [*sample, "--switch", f"0:{others / 'small'}"], "switch='0: weights", "'1: weights")


@pytest.mark.parametrize("command", ["edit", "reconstruct"])
def test_which_and_dtype_reach_the_model(tiny_model, tmp_path, capfd, command):
    photo = tmp_path / "image.png"
    Image.new("RGB", (6, 6)).save(photo)
    own = {"edit": ["--label", "1", "--expand", "2", "--image"], "reconstruct": ["--images"]}[command]
    line = [command, "--checkpoint", str(tiny_model), "--out", str(tmp_path / "out"), *own, str(photo)]
    refuse(capfd, [*line, "--which", "best"], f"{tiny_model} has no best checkpoint")
    model = load_as_asked(make_parser().parse_args([*line, "--dtype", "bfloat16"]))
    dtypes = model.tokenizer.dtype, model.transformer.dtype, *map(lambda x: x.dtype, jax.tree.leaves(model.params))
    assert set(map(jnp.dtype, dtypes)) == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(model.tokenizer_params)} == {jnp.dtype("float32")}
