"""Model directories with a damaged or unfit model.json, class names or weights are refused in one sentence."""

import contextlib
import json
import shutil

import jax.numpy as jnp
import pytest
import small_case

import mvar_jax
from mvar_jax.checkpoints.model_directory import check_finite, save_model
from mvar_jax.errors import InputError

GONE = object()


def assert_refused(directory, *words: str) -> None:
    with pytest.raises(InputError) as refusal:
        mvar_jax.load(directory)
    text = str(refusal.value)
    assert refusal.value.field == "checkpoint" and str(directory) in text and "\n" not in text
    assert all(word in text for word in words), text


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A function that writes the tiny model's model.json with some fields changed, and returns its directory."""

    def write(kind: str, **changes):
        content = json.loads((tiny_model / "model.json").read_text())
        part = content if kind == "" else content[kind]
        part |= changes
        for name in [name for name, value in changes.items() if value is GONE]:
            del part[name]
        (tmp_path / "model.json").write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("", "format", GONE, "model.json.format is missing"),
        ("", "format", "1", "model.json.format must be a whole number, got '1'"),
        ("", "tokenizer", ["x"], "model.json.tokenizer must be a group of keys, got ['x']"),
        ("", "trains", "codebook", "model.json.trains must be 'tokenizer' or 'transformer' or 'refiner' or None"),
        ("transformer", "depth", GONE, "transformer.depth is missing"),
        ("transformer", "depth", "2", "transformer.depth must be a whole number"),
        ("transformer", "width", None, "transformer.width must be a whole number"),
        ("transformer", "num_classes", "3", "num_classes must be a whole number, got '3'"),
        ("transformer", "num_classes", GONE, "num_classes is missing"),
        ("transformer", "kernel_size", {}, "transformer.kernel_size must be "),
        ("transformer", "shared_aln", "no", "transformer.shared_aln must be "),
        ("transformer", "dtype", "bf16", "transformer.dtype must be "),
        ("transformer", "dtype", ["float32"], "transformer.dtype must be "),
        ("tokenizer", "sides", "1,3", "tokenizer.sides must be "),
        ("tokenizer", "ch_mult", [1, "2"], "tokenizer.ch_mult"),
        ("tokenizer", "phi_ratio", "half", "tokenizer.phi_ratio must be a number"),
        # sizes that nobody means: no array is made, no loop begun
        ("tokenizer", "ch", 10**22, "tokenizer.ch must be at most 2147483647"),
        ("tokenizer", "num_res_blocks", 10**22, "num_res_blocks must be at most 4096"),
        ("tokenizer", "beta", 10**400, "tokenizer.beta must be at most 1e+30"),
        ("transformer", "num_classes", 10**22, "num_classes must be at most 2147483647"),
        ("transformer", "depth", 10**22, "transformer.depth must be at most 4096"),
        ("transformer", "init_head", 10**400, "transformer.init_head must be at most 1e+30"),
        ("transformer", "class_init_std", 10**400, "class_init_std must be "),
        # parts that were not made together
        ("transformer", "vocab_size", 32, "fit its tokenizer: vocab_size must be 16 as in the tokenizer, got 32"),
        ("transformer", "code_width", 8, "does not fit its tokenizer: code_width must be 4"),
        ("transformer", "sides", [1, 2], "does not fit its tokenizer: sides must be (1, 3)"),
    ],
)
def test_a_model_json_that_cannot_be_a_model_is_refused(broken, kind, name, value, words):
    assert_refused(broken(kind, **{name: value}), words)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{", "[" * 100_000])
def test_a_model_json_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "model.json").write_text(content)
    assert_refused(tmp_path, "has no readable model.json: ")


def test_class_names_that_do_not_fit_the_model_are_refused(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    for content, words in ((["ant", "bee"], "3 names"), ({"0": "ant"}, "a list"), ([1, 2, 3], "classes.json[0]")):
        (directory / "classes.json").write_text(json.dumps(content))
        assert_refused(directory, words)
    (directory / "classes.json").write_text(json.dumps(["ant", "bee", "cat"]))
    assert mvar_jax.load(directory).classes.names == ("ant", "bee", "cat")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    """A sum of large weights may be infinite: that must not pass for a weight that is."""
    params = small_case.seeded_params(small_case.TOKENIZER)
    for values, num_bad in (([jnp.nan], 1), ([jnp.inf, -jnp.inf], 2), ([3e38] * 9, 0)):
        bad = params | {"codebook": params["codebook"].at[: len(values), 1].set(jnp.array(values))}
        with pytest.raises(InputError) if num_bad else contextlib.nullcontext() as refusal:
            check_finite(tmp_path, "tokenizer", bad)
        assert not num_bad or f"holds {num_bad} weights that are NaN or infinite, in tokenizer codebook" in str(
            refusal.value
        )
    save_model(
        tmp_path,
        {"tokenizer": small_case.TOKENIZER},
        {"tokenizer": params | {"codebook": params["codebook"] * jnp.nan}},
    )
    assert_refused(tmp_path, "NaN or infinite, in tokenizer codebook")
