"""A tokenizer and a transformer in two directories, and the options of the model that commands share."""

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
