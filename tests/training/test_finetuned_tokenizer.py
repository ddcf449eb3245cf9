"""Fine-tuning of a tokenizer: where its model comes from, what is frozen, and which caches and runs stay valid."""

import functools
import json

import jax
import numpy as np
import pytest
from golden_case import quick_jit
from small_case import TINY_MODULES, seeded_params, tiny_params

from mvar_jax import build
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import fingerprint, ids_fingerprint, load_model, save_model
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import decoder_params, ids_params
from mvar_jax.tokens.cache_reader import has_ids_of
from mvar_jax.training import resume_rules
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.tokenizer_step import TokenizerRecipe, train_step

MODEL = TINY_MODULES["tokenizer"]
PARAMS = tiny_params()["tokenizer"]
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
RECIPE = TokenizerRecipe(MODEL, OptimizerOptions(ema_decay=0.9), CodebookOptions(), train_parts="decoder")
OTHER_DECODER = PARAMS | {"decoder": jax.tree.map(lambda x: x + 1, PARAMS["decoder"])}


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def decoder_steps():
    """(state before, state after two steps, text of the program) of a run that trains the decoder alone."""
    extra = {"hits": np.zeros((2, 16), np.float32)}
    state = make_state(lambda: PARAMS, RECIPE.optimizer, extra, RECIPE.trained)
    step = jax.jit(functools.partial(train_step, RECIPE))
    text = step.lower(state, {"image": PIXELS}, 0.01, 0.1).as_text()
    step = quick_jit(functools.partial(train_step, RECIPE))
    first = jax.device_get(state)
    for _ in range(2):
        state, _ = step(state, {"image": PIXELS}, 0.01, 0.1)
    return first, jax.device_get(state), text


def test_frozen_leaves_stay_bit_equal_in_weights_and_average(decoder_steps):
    before, after, _ = decoder_steps
    for now in (after.params, after.ema):
        for a, b in zip(leaves(ids_params(before.params)), leaves(ids_params(now)), strict=True):
            np.testing.assert_array_equal(a, b)
        pairs = zip(leaves(decoder_params(before.params)), leaves(decoder_params(now)), strict=True)
        assert any((a != b).any() for a, b in pairs)


def test_frozen_leaves_have_no_moments(decoder_steps):
    sizes = lambda tree: sorted(x.size for x in leaves(tree) if x.ndim)
    assert sizes(decoder_steps[0].opt_state) == sorted(2 * sizes(decoder_params(PARAMS)))


def test_a_frozen_encoder_has_no_backward_pass(decoder_steps):
    """A backward pass convolves each kernel's input with its gradient: count the convolutions by their part."""
    count = lambda function, *args: jax.jit(function).lower(*args).as_text().count("stablehlo.convolution")
    apply = lambda method: lambda params, x: MODEL.apply({"params": params}, x, method=method)
    images, latent = np.zeros((2, 6, 6, 3), np.float32), np.zeros((2, 3, 3, 4), np.float32)
    forward = count(apply(lambda module, x: module(x)[0]), PARAMS, images)
    decode = count(apply("decode_raw"), PARAMS, latent)
    # of each of the decoder's convolutions at most the gradients of its input and of its kernel
    assert decode < decoder_steps[2].count("stablehlo.convolution") - forward <= 2 * decode


def test_fingerprint_of_ids_leaves_the_decoder_out_and_nothing_else():
    assert ids_fingerprint(MODEL, OTHER_DECODER) == ids_fingerprint(MODEL, PARAMS)
    assert fingerprint(MODEL, OTHER_DECODER) != fingerprint(MODEL, PARAMS)
    for name in ("encoder", "quant_conv", "codebook", "phi_convs_0"):
        changed = PARAMS | {name: jax.tree.map(lambda x: x + 1, PARAMS[name])}
        assert ids_fingerprint(MODEL, changed) != ids_fingerprint(MODEL, PARAMS), name
    assert ids_fingerprint(MODEL.clone(phi_ratio=0.4), PARAMS) != ids_fingerprint(MODEL, PARAMS)


def test_caches_of_both_forms_keep_working_with_another_decoder(tmp_path):
    meta = {"format": 1, "tokenizer_path": "", "tokenizer": "tokenizer", "sides": [1, 3], "vocab_size": 16}
    meta |= {"dtype": "uint16", "label_names": [], "splits": {}, "tokenizer_fingerprint": fingerprint(MODEL, PARAMS)}
    save_model(tmp_path / "tokenizer", {"tokenizer": MODEL}, {"tokenizer": PARAMS})
    for ids in ({}, {"tokenizer_ids": ids_fingerprint(MODEL, PARAMS)}):
        (tmp_path / "cache.json").write_text(json.dumps(meta | ids))
        assert has_ids_of(tmp_path, Networks(MODEL, PARAMS)) and has_ids_of(tmp_path, Networks(MODEL, OTHER_DECODER))
        assert not has_ids_of(tmp_path, Networks(MODEL, seeded_params(MODEL, seed=5)))


def test_a_run_that_noted_a_whole_tokenizer_goes_on_with_another_decoder(tmp_path):
    save_model(tmp_path, {"tokenizer": MODEL}, {"tokenizer": PARAMS})
    noted = {"tokenizer": fingerprint(MODEL, PARAMS)}
    digests = {"tokenizer": fingerprint, "tokenizer_ids": ids_fingerprint}
    identity = lambda params: {key: digest(MODEL, params) for key, digest in digests.items()}
    for stored in (noted, identity(PARAMS)):
        resume_rules._check_data(tmp_path, stored, identity(OTHER_DECODER), [])
        with pytest.raises(InputError, match="config.data must name the data of the run"):
            resume_rules._check_data(tmp_path, stored, identity(seeded_params(MODEL, seed=5)), [])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model directory of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    save_model(folder, {"tokenizer": MODEL}, {"tokenizer": PARAMS})
    return folder


def line(source, workdir, *overrides: str) -> list[str]:
    own = [f"init_from={source}", "train_parts=decoder", "batch_size=2", "num_steps=2", "picture_every_steps=-1"]
    own += ["eval_every_steps=0", "save_every_steps=1", "data.source=synthetic", "data.image_size=6", "data.size=4"]
    own += ["data.flip=False", "data.val_fraction=0.2", "model.sides=(1,3)", "optimizer.warmup_steps=1"]
    own += ["codebook.perceptual_weight=0.0", "adversary.layers=1", "adversary.width=4", "log_every_steps=1"]
    options = [f"--config.{override}" for override in [*own, *overrides]]
    return ["train", "--config", "tokenizer_finetune", "--workdir", str(workdir), *options]


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    """A complete run that trained the decoder alone, against a discriminator."""
    folder = tmp_path_factory.mktemp("run")
    assert main(line(source, folder)) == 0
    return folder


def test_a_decoder_alone_trains_against_a_discriminator(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("discriminator_loss" in str(metrics) for metrics in lines) == 2
    params = load_model(workdir)[1]["tokenizer"]
    assert ids_fingerprint(MODEL, params) == ids_fingerprint(MODEL, PARAMS)
    assert fingerprint(MODEL, params) != fingerprint(MODEL, PARAMS)


def test_a_run_takes_its_model_from_a_directory_and_resumes_without_it(workdir, tmp_path):
    from mvar_jax.cli.configuration import read_config

    assert load_model(workdir)[0]["tokenizer"] == MODEL
    options = [text for text in line(tmp_path / "gone", "") if text.startswith("--config.")]
    config, initial = build.with_initial_model(read_config("tokenizer_finetune", options), workdir)
    assert initial is None and build.build_module(config) == MODEL


def test_a_run_resumes_with_its_model_although_the_config_names_no_initial_weights_any_more(workdir):
    """Also the next time: config.json keeps what the run began with."""
    from mvar_jax.cli.configuration import read_config

    options = [text for text in line("", "", "train_parts=all") if text.startswith("--config.")]
    config, _ = build.with_initial_model(read_config("tokenizer_finetune", options), workdir)
    assert build.build_module(config) == MODEL
    assert config["init_from"] == json.loads((workdir / "config.json").read_text())["init_from"] != ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init_from="], "config.train_parts=decoder needs config.init_from"),
        (["train_parts=encoder"], "config.train_parts must be all or decoder, got 'encoder'"),
        (["codebook.warmup_steps=3"], "config.codebook.warmup_steps must be 0 with config.train_parts=decoder"),
        (["codebook.revive_every_steps=3"], "config.codebook.revive_every_steps must be 0"),
        (["codebook.simvq=True"], "config.codebook.simvq must be False with config.train_parts=decoder"),
        (["codebook.simvq=True", "train_parts=all"], "config.codebook.simvq must be False with config.init_from"),
        (["codebook.scale_dropout=0.1"], "config.codebook.scale_dropout must be 0.0 with config.train_parts=decoder"),
        (["codebook.entropy_weight=1.0", "codebook.entropy_until_step=2"], "codebook.entropy_weight must be 0.0"),
        (["model.vocab_size=8"], r"must have tokenizer codebook of shape \(8, 4\), got \(16, 4\)"),
        (["model.dtype=bfloat16"], "config.model.dtype must be 'float32' as in config.init_from=.*, got 'bfloat16'"),
        (["model.phi_ratio=0.4"], "config.model.phi_ratio must be 0.5 as in"),
        (["init_from={transformer}"], "holds no tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(source, tmp_path, overrides, words):
    from mvar_jax.cli.configuration import read_config

    save_model(tmp_path, {"transformer": TINY_MODULES["transformer"]}, {"transformer": tiny_params()["transformer"]})
    overrides = [override.format(transformer=tmp_path) for override in overrides]
    options = [text for text in line(source, "", *overrides) if text.startswith("--config.")]
    with pytest.raises(InputError, match=words) as caught:
        build.build_task(*build.with_initial_model(read_config("tokenizer_finetune", options)))
    assert "\n" not in str(caught.value)


def test_training_everything_says_that_caches_become_invalid(source):
    from mvar_jax.cli.configuration import read_config

    options = [text for text in line(source, "", "train_parts=all") if text.startswith("--config.")]
    _, initial = build.with_initial_model(read_config("tokenizer_finetune", options))
    assert "changes its ids: token caches and transformers of it do not fit the result" in initial.note
