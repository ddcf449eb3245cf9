"""Remedies against unused codes: the codebook E W, the entropy term, scale dropout; and how usage is counted."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit
from small_case import TOKENIZER, seeded_params

from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.checkpoints.model_directory import load_model, write_model_file
from mvar_jax.data.options import LoadOptions
from mvar_jax.data.sources import SyntheticSource
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.models.tokenizer import BASIS, MAP, multiply_codebook
from mvar_jax.ops.losses import commitment_loss
from mvar_jax.ops.metrics import perplexities, perplexity, usage_percent
from mvar_jax.ops.quantize import assignment_entropy, nearest_code
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sharding import make_mesh
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.redraw import spread_codes
from mvar_jax.training.task import RunOptions, TaskData
from mvar_jax.training.tokenizer_step import (
    EntropyTerm,
    TokenizerRecipe,
    describe_usage,
    draw_num_scales,
    draw_rows,
    draw_tokens,
    entropy_term,
    tokenizer_loss,
)
from mvar_jax.training.tokenizer_task import TokenizerTask

SIDES = (1, 2)
MODEL = TOKENIZER.clone(sides=SIDES, num_phi=1, ch_mult=(1,))
ALL = CodebookOptions(
    warmup_steps=1,
    simvq=True,
    entropy_weight=0.1,
    entropy_until_step=4,
    entropy_temperature=0.5,
    scale_dropout=0.5,
    scale_dropout_first=1,
)


def make_task(num_parts: int = 1, options: CodebookOptions = ALL) -> TokenizerTask:
    sources = {split: SyntheticSource(split, seed=0, size=8) for split in ("train", "val")}
    data = TaskData(sources, PhotoTransform(2, flip=False), LoadOptions())
    optimizer = OptimizerOptions(base_learning_rate=1.0, ema_decay=0.5, weight_decay=0.1)
    run = RunOptions(0, 3, 8, optimizer, make_mesh(devices=jax.devices()[:1]), accumulate_steps=num_parts)
    return TokenizerTask(run, MODEL, options, data)


@pytest.fixture(scope="module")
def trained():
    """(task, states before and after each of three steps, metrics): the last two have codes drawn from residuals."""
    task = make_task()
    state, history, metrics = task.init_state(), [], []
    history.append(jax.device_get(state))
    batches = task.batches(0)
    for step in range(3):
        state, found = task.train_step(state, next(batches), step)
        history.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return task, state, history, metrics


def test_basis_stands_still_while_the_map_learns(trained):
    """E is the ordinary initial codebook, in the average too, bit for bit: neither decay nor rounding moves it."""
    _, _, history, _ = trained
    for state in history:
        for tree in (state.params, state.ema):
            np.testing.assert_array_equal(tree[BASIS], history[0].params[BASIS])
    maps = [state.params[MAP] for state in history]
    np.testing.assert_array_equal(maps[0], np.eye(4))
    np.testing.assert_array_equal(maps[1], maps[0])  # unquantized
    assert (maps[2] != maps[1]).any() and (maps[3] != maps[2]).any()


def test_checkpoint_of_factors_loads_as_an_ordinary_codebook_with_the_ids_of_training(trained, tmp_path):
    task, state, history, _ = trained
    write_model_file(tmp_path, {"tokenizer": MODEL}, "tokenizer")
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(state, {"step": 3, "config": {}})
        checkpoints.wait()
    params = load_model(tmp_path)[1]["tokenizer"]
    ema = history[-1].ema
    np.testing.assert_allclose(params["codebook"], ema[BASIS] @ ema[MAP], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(task.averaged(state)))
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    in_training = jax.jit(lambda params: nearest_code(x, multiply_codebook(params)["codebook"]))
    np.testing.assert_array_equal(nearest_code(x, params["codebook"]), in_training({n: ema[n] for n in (BASIS, MAP)}))


def test_drawn_map_gives_the_codes_the_second_moments_of_residuals():
    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.normal(size=(4096, 4)) @ rng.normal(size=(4, 4)), jnp.float32)
    basis = jnp.asarray(rng.normal(size=(4096, 4)) / 2, jnp.float32)
    task_state = dataclasses.make_dataclass("State", ["params", "ema", "opt_state"])
    task_state.replace = lambda self, **changes: dataclasses.replace(self, **changes)
    state = task_state({BASIS: basis, MAP: jnp.eye(4)}, None, {MAP: jnp.ones((4, 4))})
    new = spread_codes(state, drawn)
    codes = basis @ new.params[MAP]
    np.testing.assert_allclose(codes.T @ codes / 4096, drawn.T @ drawn / 4096, rtol=0.1, atol=0.15)
    np.testing.assert_array_equal(new.opt_state[MAP], 0)
    spoilt = spread_codes(state, drawn.at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(spoilt.params[MAP], state.params[MAP])


@pytest.fixture(scope="module")
def dropped():
    """((loss, parts), gradients) of a batch by the weight of the entropy term, and (losses, rests) and their gradient
    of a loop over its rows, which keep 1, 2 and 1 scales."""
    params, kept = seeded_params(MODEL), (1, 2, 1)
    images = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (3, 2, 2, 3)), jnp.float32)
    rows = {"image": images, "num_scales": jnp.asarray(kept), "tokens": jnp.asarray(TOKENS)}

    def together(params, weight):
        return tokenizer_loss(MODEL, ALL, params, rows, True, entropy=EntropyTerm(weight, 0.5))

    def of_row(params, image, num):
        f = MODEL.apply({"params": params}, image[None], method="features")
        encoded = MODEL.apply({"params": params}, f, method="quantize")
        first = [encoded.f_hats[:k] for k in (1, 2)]
        pick = [lambda f_hats=f_hats: (f_hats[-1], commitment_loss(f, f_hats, MODEL.beta)) for f_hats in first]
        f_hat, commitment = jax.lax.switch(num - 1, pick)
        rec = MODEL.apply({"params": params}, jax.lax.stop_gradient(f_hat - f) + f, method="decode_raw")
        return jnp.mean(jnp.square(rec[0] - image)) + commitment, jnp.concatenate(encoded.rests, axis=1)[0]

    run, run_row = (quick_jit(jax.value_and_grad(fn, has_aux=True)) for fn in (together, of_row))
    looped = [run_row(params, image, num) for image, num in zip(images, kept, strict=True)]
    (losses, rests), grads = zip(*(x[0] for x in looped), strict=True), [x[1] for x in looped]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *grads)
    return {weight: run(params, weight) for weight in (0.0, 0.5)}, (losses, rests, mean), params["codebook"]


TOKENS = ((0, 1), (2, 4), (3, 3))


def test_rows_with_dropped_scales_equal_a_loop_over_rows(dropped):
    ((loss, _), grads), (losses, _, expected) = dropped[0][0.0], dropped[1]
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), grads, expected)


def test_entropy_term_counts_by_its_weight_and_takes_the_drawn_tokens(dropped):
    (without, _), (with_term, parts) = (dropped[0][weight][0] for weight in (0.0, 0.5))
    tokens = np.concatenate([np.asarray(rest)[list(row)] for rest, row in zip(dropped[1][1], TOKENS, strict=True)])
    np.testing.assert_allclose(parts["entropy_loss"], assignment_entropy(tokens, dropped[2], 0.5), rtol=1e-4)
    np.testing.assert_allclose(with_term - without, 0.5 * parts["entropy_loss"], rtol=1e-4)


@pytest.mark.parametrize(("rows", "parts"), [(2, 1), (300, 1), (2048, 2), (2049, 1), (6144, 3), (100_000, 4)])
def test_entropy_term_takes_at_most_2048_tokens_of_a_batch_of_any_size(rows, parts):
    """Each part of an accumulated batch gives its own, spread over its rows."""

    class Recorder:
        def apply(self, _, rests, tokens, temperature, method):
            assert rests[0].shape[0] == len(tokens)
            return tokens.size

    recipe = TokenizerRecipe(MODEL, OptimizerOptions(), dataclasses.replace(ALL, scale_dropout=0.0))
    drawn = jax.eval_shape(functools.partial(draw_rows, recipe), {"index": np.arange(rows, dtype=np.uint32)})
    tokens = np.zeros((rows // parts, *drawn["tokens"].shape[1:]))
    taken = parts * entropy_term(ALL, jnp.asarray(1), rows).of(Recorder(), {}, (tokens[..., None],), tokens)
    assert 1024 <= taken <= 2048


def test_kept_scales_are_a_function_of_seed_and_sample_and_uniform_from_the_first():
    options = CodebookOptions(scale_dropout=0.5, scale_dropout_first=3)
    draw = jax.jit(functools.partial(draw_num_scales, options, 5))
    index = np.arange(4000)
    kept = np.asarray(draw(keys_of_samples(7, index)))
    np.testing.assert_array_equal(draw(keys_of_samples(7, index[::-1])), kept[::-1])
    shares = [np.mean(kept == k) for k in range(6)]
    np.testing.assert_allclose(shares, [0, 0, 0, 1 / 6, 1 / 6, 2 / 3], atol=0.03)


def test_tokens_of_the_entropy_term_come_from_every_scale_alike():
    tokens = np.asarray(draw_tokens((1, 2, 4), keys_of_samples(0, np.arange(300)), 10))
    assert tokens.min() == 0 and tokens.max() == 20
    scale = np.searchsorted([1, 5], tokens, side="right")
    np.testing.assert_allclose(np.bincount(scale.ravel()) / tokens.size, 1 / 3, atol=0.03)


def test_entropy_term_equals_its_definition_and_stays_finite_at_its_temperature():
    rng = np.random.default_rng(5)
    x, codebook = (rng.normal(size=(n, 4)).astype(np.float32) for n in (7, 5))
    distances = ((x[:, None] - codebook).astype(np.float64) ** 2).sum(-1)
    p = np.exp(-distances / 0.7)
    p /= p.sum(1, keepdims=True)
    expected = -(p * np.log(p)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    np.testing.assert_allclose(assignment_entropy(x, codebook, 0.7), expected, rtol=1e-5)
    grads = quick_jit(jax.grad(lambda x, codes: assignment_entropy(x, codes, 0.01), argnums=(0, 1)))(x, codebook)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_entropy_weight_fades_and_is_zero_in_the_warm_up(trained):
    weights = [float(ALL.entropy_weight_at(jnp.asarray(step))) for step in range(6)]
    np.testing.assert_allclose(weights, [0, 0.075, 0.05, 0.025, 0, 0], atol=1e-7)
    assert all(np.isfinite(metrics["entropy_loss"]) for metrics in trained[-1])


def test_own_margin_can_be_passed_by_all_codes_where_the_published_one_cannot():
    """Ten scales of 16 x 16 whose codes are all hit alike: the published counter has its known ceilings."""
    sides, B, V = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096, 4096
    hits = jnp.asarray([[B * side**2 / V] * V for side in sides], jnp.float32)
    usage = describe_usage(hits, B, sides)
    np.testing.assert_array_equal(usage["own_usage_per_scale"], 100)
    np.testing.assert_allclose(usage["perplexity_per_scale"], V, rtol=1e-4)
    # the hits of one scale on as few codes as pass the published margin
    for scale, ceiling in enumerate((4.9, 19.5, 43.9, 78.1)):
        tokens = B * sides[scale] ** 2
        num = int(tokens / (0.08 * B * 256 / V))
        best = jnp.zeros((1, V)).at[0, :num].set(tokens / num)
        assert float(usage_percent(best, B * 256)[0]) == pytest.approx(ceiling, abs=0.05)


def test_perplexities_of_rows_are_perplexity_of_each():
    hits = np.random.default_rng(0).integers(0, 4, (3, 20)).astype(np.float32)
    expected = [perplexity(row) for row in hits]
    np.testing.assert_allclose(jax.jit(perplexities)(hits), expected, rtol=1e-5)
    np.testing.assert_allclose(perplexities(np.zeros((1, 4), np.float32)), [1])


def test_evaluation_tells_psnr_and_usage_of_each_scale(trained):
    task, state, history, _ = trained
    found = task.evaluate(state)
    assert json.loads(json.dumps(found)) == found
    assert all(len(found[f"{name}_per_scale"]) == 2 for name in ("own_usage", "perplexity"))
    assert len(found["psnr_per_scale_db"]) == 2
    # the split has fewer images than are shown, so the last scale's PSNR is that of all
    assert found["psnr_per_scale_db"][-1] == pytest.approx(found["psnr_db"], rel=1e-4)
    histograms = task.histograms(state)
    assert list(histograms) == [
        "codes/hits/scale_0",
        "codes/hits/scale_1",
        "codes/own_usage_per_scale",
        "codes/perplexity_per_scale",
    ]
    assert histograms["codes/hits/scale_0"].mean() == pytest.approx(1, rel=1e-5)
    assert task.histograms(history[0]) == {}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"scale_dropout": 1.5}, "scale_dropout", "a number from 0 to 1"),
        ({"scale_dropout_first": 0}, "scale_dropout_first", "a whole number of at least 1"),
        ({"simvq": True, "revive_every_steps": 5}, "revive_every_steps", "0 with simvq"),
        ({"entropy_weight": 0.1}, "entropy_until_step", "above warmup_steps=0"),
        ({"revive_every_steps": 5}, "revive_every_steps", "0 if revive_until_step is 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature", "a number above 0"),
    ],
)
def test_remedies_out_of_range_are_refused(changes, field, words):
    with pytest.raises(InputError, match=f"^config.codebook.{field} must be {words}.*, got ") as caught:
        CodebookOptions(**changes)
    assert caught.value.field == f"config.codebook.{field}"


def test_scale_dropout_beyond_the_scales_is_refused():
    with pytest.raises(InputError, match="^config.codebook.scale_dropout_first must be at most 2, .*, got 3$"):
        make_task(options=CodebookOptions(scale_dropout=0.1))
