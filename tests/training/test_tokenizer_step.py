import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import load, quick_jit
from small_case import TOKENIZER, seeded_params

from mvar_jax.errors import InputError
from mvar_jax.ops.metrics import usage_percent
from mvar_jax.ops.pixels import from_levels
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.redraw import redraw_codes
from mvar_jax.training.state import make_state
from mvar_jax.training.tokenizer_step import (
    TokenizerRecipe,
    count_hits,
    tokenizer_loss,
    train_step,
)

MODEL = TOKENIZER.clone(sides=(1, 2), num_phi=1, ch_mult=(1,))
OPTIMIZER = OptimizerOptions(weight_decay=0.0, ema_decay=0.5)
OPTIONS = CodebookOptions(warmup_steps=1, usage_early_steps=2, l1_weight=0.3, revive_below=0.4)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), np.uint8)
IMAGES = jnp.asarray(from_levels(PIXELS))
HITS = jnp.asarray(np.random.default_rng(1).uniform(0, 0.5, (2, 16)), jnp.float32)


@pytest.fixture(scope="module")
def history():
    """(state, metrics) before and after each of four steps: one unquantised, then two early ones, then a late one."""
    step = quick_jit(functools.partial(train_step, TokenizerRecipe(MODEL, OPTIMIZER, OPTIONS)))
    params = seeded_params(MODEL)
    states = [(quick_jit(lambda: make_state(lambda: params, OPTIMIZER, {"hits": HITS}))(), None)]
    for _ in range(4):
        states.append(jax.device_get(step(states[-1][0], {"image": PIXELS}, 0.01, 0.0)))
    return states


@pytest.fixture(scope="module")
def encode():
    quantize = lambda module, images: module.quantize(module.features(images))
    run = quick_jit(lambda params: MODEL.apply({"params": params}, IMAGES, method=quantize))
    return lambda state: run(state.params)


def test_usage_equals_golden():
    hits_SV = jnp.asarray(load("vae")["quantize.ema_vocab_hit_SV"])
    ours = usage_percent(hits_SV, num_tokens=2 * 256)
    np.testing.assert_allclose(ours, load("tokenizer")["usages"], rtol=1e-6)


def test_hits_are_counted_scale_by_scale():
    ids_BL = jnp.asarray([[3, 0, 0, 1, 3], [2, 0, 1, 1, 1]])
    np.testing.assert_array_equal(count_hits(ids_BL, (1, 2), 4), [[0, 0, 1, 1], [3, 4, 0, 1]])


def test_usage_average_decays_faster_early(history, encode):
    for i, decay in enumerate((0.9, 0.9, 0.9, 0.99)):
        (before, _), (after, metrics) = history[i : i + 2]
        hits_SV = count_hits(encode(before).ids_BL, MODEL.sides, 16)
        expected = decay * before.extra["hits"] + (1 - decay) * hits_SV
        np.testing.assert_allclose(after.extra["hits"], expected, rtol=1e-5)
        share_S = 100 * np.mean(np.asarray(expected) >= 0.08 * 3 * 4 / 16, axis=1)
        np.testing.assert_allclose(metrics["usage_per_scale"], share_S)


def test_codebook_stands_still_until_codes_are_used(history):
    codebooks = [state.params["codebook"] for state, _ in history]
    np.testing.assert_array_equal(codebooks[1], codebooks[0])
    assert (codebooks[2] != codebooks[1]).any()
    assert history[1][1]["quantizer_loss"] == 0 < history[2][1]["quantizer_loss"]
    kernels = [state.params["encoder"]["conv_in"]["kernel"] for state, _ in history]
    assert (kernels[1] != kernels[0]).any()


def test_loss_weighs_l1_l2_and_the_quantizer(history):
    @quick_jit
    def run(params):
        rec, quantizer_loss, _ = MODEL.apply({"params": params}, IMAGES)
        return tokenizer_loss(MODEL, OPTIONS, params, {"image": IMAGES}, True), rec, quantizer_loss

    state, _ = history[1]
    (loss, parts), rec, quantizer_loss = run(state.params)
    error = np.asarray(rec - IMAGES, np.float64)
    expected = 0.3 * np.abs(error).mean() + np.square(error).mean() + float(quantizer_loss)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(history[2][1]["loss"]) == pytest.approx(expected, rel=1e-5)
    clipped = np.square(np.clip(rec, -1, 1) - IMAGES).mean()
    assert float(parts["mse"]) == pytest.approx(clipped, rel=1e-5)
    psnr_db = 10 * np.log10(4 / clipped)
    assert float(history[2][1]["psnr_db"]) == pytest.approx(psnr_db, rel=1e-4)


@pytest.mark.parametrize("step", [1, 2])
def test_redrawn_codes_are_residuals_of_the_batch(step, history, encode):
    """All of them at the end of the warm-up, later those alone that fell out of use."""
    state = history[step][0]
    key = jax.random.key(4)
    redraw = quick_jit(functools.partial(redraw_codes, MODEL, OPTIONS))
    new = redraw(state, {"image": PIXELS}, key)
    hits_V = np.asarray(state.extra["hits"]).sum(0)
    is_redrawn = np.ones(16, bool) if step == 1 else hits_V < 0.4
    assert is_redrawn.any() and (step == 1 or not is_redrawn.all())
    rests = np.concatenate([np.asarray(rest).reshape(-1, 4) for rest in encode(state).rests])
    codebook = np.asarray(new.params["codebook"])
    distances = np.abs(codebook[:, None] - rests).max(-1)
    np.testing.assert_array_equal(distances.min(1) < 1e-5, is_redrawn)
    assert (distances.argmin(1)[is_redrawn] < 3).any() and (distances.argmin(1)[is_redrawn] >= 3).any()
    np.testing.assert_array_equal(codebook[~is_redrawn], state.params["codebook"][~is_redrawn])
    # the average and the moments follow, or they would pull the new code back
    np.testing.assert_array_equal(new.ema["codebook"][is_redrawn], codebook[is_redrawn])
    np.testing.assert_array_equal(new.ema["codebook"][~is_redrawn], state.ema["codebook"][~is_redrawn])
    moments = lambda state: state.opt_state.inner_states["rest"].inner_state
    for name in ("mu", "nu"):
        before, after = (getattr(moments(s), name)["codebook"] for s in (state, new))
        np.testing.assert_array_equal(after[is_redrawn], 0)
        np.testing.assert_array_equal(after[~is_redrawn], before[~is_redrawn])
    assert (np.asarray(new.extra["hits"]).sum(0)[is_redrawn] >= 0.4).all()
    encoders = (s.params["encoder"] for s in (state, new))
    jax.tree.map(np.testing.assert_array_equal, *encoders)


def test_weights_that_are_not_finite_poison_neither_codes_nor_statistics(history):
    """A redraw and a step with an encoder that gives NaN leave the rest of the state as it was."""
    state = history[1][0]
    spoilt = {**state.params, "encoder": jax.tree.map(lambda x: x * np.nan, state.params["encoder"])}
    state = state.replace(params=spoilt)
    new = quick_jit(functools.partial(redraw_codes, MODEL, OPTIONS))(state, {"image": PIXELS}, jax.random.key(4))
    np.testing.assert_array_equal(new.params["codebook"], state.params["codebook"])
    step = quick_jit(functools.partial(train_step, TokenizerRecipe(MODEL, OPTIMIZER, OPTIONS)))
    new, metrics = step(state, {"image": PIXELS}, 0.01, 0.0)
    assert metrics["is_bad"] == 1
    np.testing.assert_array_equal(new.extra["hits"], state.extra["hits"])


def test_codes_are_redrawn_after_the_warm_up_and_then_at_intervals_to_a_last_step():
    options = CodebookOptions(warmup_steps=30, revive_every_steps=15, revive_until_step=60)
    assert [step for step in range(100) if options.is_redraw_due(step)] == [30, 45, 60]
    assert not any(CodebookOptions().is_redraw_due(step) for step in range(100))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"revive_every_steps": -1}, "revive_every_steps"),
        ({"revive_until_step": -1}, "revive_until_step"),
        ({"l1_weight": -1.0}, "l1_weight"),
        ({"l2_weight": 0.0}, "l2_weight"),
    ],
)
def test_codebook_options_out_of_range_are_refused(changes, field):
    with pytest.raises(InputError, match=f"^config.codebook.{field} must be .*, got ") as caught:
        CodebookOptions(**changes)
    assert caught.value.field == f"config.codebook.{field}"
