import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import LOSSES, MVAR, OPTIMIZER, assert_close, load, published_transformer, quick_jit
from small_case import MODEL, seeded_batch, seeded_params

from mvar_jax.errors import InputError
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import make_state
from mvar_jax.training.transformer_step import (
    PhaseOptions,
    TransformerRecipe,
    draw_paths,
    drop_labels,
    eval_step,
    phase_loss,
    train_step,
)

GOLDEN = load("optim")
LABELS = jnp.asarray([1, 3])


update = quick_jit(apply_gradients, static_argnums=(0, 5))
new_state = quick_jit(lambda params, options: make_state(lambda: params, options), static_argnums=1)


@pytest.fixture(scope="module")
def golden_steps(transformer_params, golden_batch, phase_programs):
    """clip norm -> (state, metrics) after each of six steps over the phases 0, 1, 2, 0, 1, 2."""
    batch = {**golden_batch, "label": LABELS}

    @functools.cache
    def six_steps(clip_norm):
        options = OptimizerOptions(clip_norm=clip_norm)
        state, history = new_state(transformer_params, options), []
        for i in GOLDEN[f"clip{clip_norm}_phase"]:
            result = phase_programs[i](state.params, batch)
            trains_start = MVAR.phases()[i].trains_start
            state, metrics = update(options, state, result["grads"], 1e-3, 0.05, trains_start)
            history.append((state, {**metrics, "loss": result["loss"]}))
        return history

    return six_steps


@pytest.mark.parametrize("clip_norm", [2.0, 0.05])
def test_six_steps_equal_golden(clip_norm, golden_steps, transformer_params):
    steps, prefix = golden_steps(clip_norm), f"clip{clip_norm}_"
    values = lambda name: [metrics[name] for _, metrics in steps]
    assert_close(f"{clip_norm} loss", values("loss"), GOLDEN[prefix + "loss"], **OPTIMIZER)
    # a norm of gradients: float32 alone moves it by more than a millionth from the second step on
    assert_close(f"{clip_norm} gnorm", values("grad_norm"), GOLDEN[prefix + "gnorm"], rtol=1e-5)
    first, final = published_transformer(transformer_params), published_transformer(steps[-1][0].params)
    for name, norm, delta in zip(
        *(GOLDEN[prefix + key].tolist() for key in ("names", "final_norms", "delta_norms")), strict=True
    ):
        ours = final[name].astype(np.float64)
        assert_close(f"{clip_norm} norm of {name}", np.linalg.norm(ours), norm, **OPTIMIZER)
        assert_close(f"{clip_norm} change of {name}", np.linalg.norm(ours - first[name]), delta, rtol=1e-4)
        subset = GOLDEN.get(f"{prefix}final_idx/{name}")
        if subset is not None:
            expected = GOLDEN[f"{prefix}final_val/{name}"]
            error = np.linalg.norm(final[name].reshape(-1)[subset] - expected) / np.linalg.norm(expected)
            assert_close(f"{clip_norm} final {name}", error, 0, atol=OPTIMIZER["rtol"])


@pytest.mark.parametrize("clip_norm", [2.0, 0.05])
def test_start_position_steps_equal_golden(clip_norm, golden_steps):
    steps = golden_steps(clip_norm)
    counts = {name: int(s.inner_state.count) for name, s in steps[-1][0].opt_state.inner_states.items()}
    names, num_steps = (GOLDEN[f"clip{clip_norm}_{key}"].tolist() for key in ("names", "opt_steps"))
    expected = dict(zip(names, num_steps, strict=True))
    assert counts == {"start": expected.pop("pos_start"), "rest": 6}
    assert set(expected.values()) == {6}
    starts = [state.params["pos_start"] for state, _ in steps]
    for i in (1, 2, 4, 5):  # window phases
        np.testing.assert_array_equal(starts[i], starts[i - 1])
    assert (starts[3] != starts[2]).any()


def test_evaluation_equals_golden(transformer_params, golden_batch):
    batch = {**golden_batch, "label": LABELS, "mask": jnp.ones(2)}
    evaluate = quick_jit(functools.partial(eval_step, MVAR))
    nll_S, hits_S, rows = (np.asarray(x, np.float64) for x in evaluate(transformer_params, batch))
    assert rows == 2
    areas = np.asarray(MVAR.pyramid.areas)
    golden = dict(zip(GOLDEN["eval_kw_names"].tolist(), GOLDEN["eval_kw_vals"], strict=True))
    for scale, side in enumerate(MVAR.sides):
        assert_close(f"eval loss {side}", nll_S[scale] / rows / areas[scale], golden[f"vL_{16 * side}"], **LOSSES)
        assert_close(f"eval acc {side}", 100 * hits_S[scale] / rows / areas[scale], golden[f"vacc_{16 * side}"], 1e-6)
    mean, tail, mean_accuracy, tail_accuracy = GOLDEN["eval_L_mean_L_tail_acc_mean_acc_tail"]
    cuts = [slice(phase.first, phase.last + 1) for phase in MVAR.phases()]
    sum_of_means = lambda x_S: sum(x_S[cut].sum() / areas[cut].sum() for cut in cuts) / rows
    assert_close("eval mean", sum_of_means(nll_S), mean, **LOSSES)
    assert_close("eval tail", nll_S[-1] / rows / areas[-1], tail, **LOSSES)
    assert_close("eval accuracy", 100 * sum_of_means(hits_S), mean_accuracy, 1e-6)
    assert_close("eval tail accuracy", 100 * hits_S[-1] / rows / areas[-1], tail_accuracy, 1e-6)
    # a padded row counts for nothing
    both = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:1]]), batch) | {"mask": jnp.asarray([1.0, 0.0])}
    one_S, _, rows = evaluate(transformer_params, {**batch, "mask": both["mask"]})
    assert rows == 1
    two_S, _, _ = evaluate(transformer_params, {**batch, "mask": jnp.asarray([0.0, 1.0])})
    np.testing.assert_allclose(one_S + two_S, nll_S, rtol=1e-5)


# Whole steps, on a small model.

SMALL = MODEL.clone(sides=(1, 2, 4), drop_path_rate=0.5)
NO_CLIP = OptimizerOptions(clip_norm=0)
PARAMS = seeded_params(SMALL)
BATCH = {name: x for name, x in seeded_batch(SMALL, 4).items() if name != "previous"}


def embed_ids(ids_BL):
    """A stand-in for the tokenizer: some function of the ids."""
    return jnp.sin(ids_BL[:, 1:, None] * jnp.arange(1.0, 5))


@quick_jit
def draw_dropouts(labels, index):
    keys = keys_of_samples(0, index)
    return drop_labels(labels, keys, 0.5, SMALL.num_classes), draw_paths(SMALL, keys)


@functools.partial(quick_jit, static_argnums=1)
def loss_and_grads(params, phase, batch):
    return jax.value_and_grad(lambda params: phase_loss(SMALL, params, batch, phase), has_aux=True)(params)


@pytest.mark.parametrize(("schedule", "first"), [("joint", 0), ("paper", 1)])
def test_a_step_descends_the_sum_of_its_phases_losses(schedule, first):
    phases = SMALL.phases()[first:]
    options = PhaseOptions(schedule, label_drop_rate=0.5)
    recipe = TransformerRecipe(SMALL, NO_CLIP, options)

    @quick_jit
    def step(state, batch, *rates):
        return train_step(recipe, phases, state, {**batch, "previous": embed_ids(batch["ids"])}, *rates)

    state = new_state(PARAMS, NO_CLIP)
    # as if it had moved before: without a gradient only old moments could move the start position
    state = state.replace(opt_state=jax.tree.map(lambda x: 1 + np.asarray(x), state.opt_state))
    after, metrics = jax.device_get(step(state, BATCH, 0.01, 0.05))

    labels, path = jax.device_get(draw_dropouts(BATCH["label"], BATCH["index"]))
    assert 0 < (labels == SMALL.num_classes).sum() < 4 and (path == 0).sum() > 0
    seen = {"ids": BATCH["ids"], "label": labels, "previous": embed_ids(BATCH["ids"]), "path": path}
    results = jax.device_get([loss_and_grads(PARAMS, phase, seen) for phase in phases])
    loss = sum(loss for (loss, _), _ in results)
    nll_BS = np.concatenate([nll for (_, (nll, _)), _ in results], axis=1)
    grads = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *(grads for _, grads in results))
    expected, expected_metrics = update(NO_CLIP, state, grads, 0.01, 0.05, first == 0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params, expected.params)
    assert (after.params["pos_start"] == PARAMS["pos_start"]).all() == (first == 1)

    trained = slice(phases[0].first, None)
    areas = np.asarray(SMALL.pyramid.areas)[trained]
    np.testing.assert_allclose(metrics["loss_per_scale"][trained], nll_BS.mean(0) / areas, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.sum(metrics["loss_per_scale"][trained] * areas) / 21, rtol=1e-5)
    for name in ("loss_per_scale", "accuracy_per_scale"):
        np.testing.assert_array_equal(np.isnan(metrics[name]), np.arange(3) < phases[0].first)

    # a sample's randomness goes with its place in the stream, not with its row
    _, again = step(state, jax.tree.map(lambda x: np.asarray(x)[::-1], BATCH), 0.01, 0.05)
    np.testing.assert_allclose(again["loss"], loss, rtol=1e-5)


def test_paper_schedule_trains_one_phase_and_joint_all():
    phases = MVAR.phases()
    paper = [PhaseOptions(ratio=2).phases_of_step(MVAR, step) for step in range(5)]
    assert paper == [(phases[i],) for i in (0, 0, 1, 2, 0)]
    assert PhaseOptions(schedule="joint").phases_of_step(MVAR, 3) == phases


def test_labels_are_dropped_at_the_given_rate_sample_by_sample():
    keys, labels = keys_of_samples(0, jnp.arange(20000)), jnp.arange(20000) % 10
    dropped = np.asarray(drop_labels(labels, keys, 0.1, 10))
    is_dropped = dropped == 10
    assert is_dropped.mean() == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / 20000))
    np.testing.assert_array_equal(dropped[~is_dropped], labels[~is_dropped])
    np.testing.assert_array_equal(drop_labels(labels[7:9], keys[7:9], 0.1, 10), dropped[7:9])
    np.testing.assert_array_equal(drop_labels(labels, keys, 0.0, 10), labels)


def test_drop_path_factors_have_mean_one_and_linear_rates():
    model, num = MODEL.clone(depth=5, drop_path_rate=0.4), 8000
    np.testing.assert_allclose(model.drop_path_rates(), [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    keys = keys_of_samples(3, jnp.arange(num))
    path_D2B = np.asarray(draw_paths(model, keys))
    assert path_D2B.shape == (5, 2, num)
    for rate, factors_2B in zip(np.linspace(0, 0.4, 5), path_D2B, strict=True):
        assert set(np.unique(factors_2B)) <= {np.float32(0), np.float32(1 / (1 - np.float32(rate)))}
        np.testing.assert_allclose((factors_2B == 0).mean(1), rate, atol=0.03)
        np.testing.assert_allclose(factors_2B.mean(1), 1, atol=0.04)
    # blocks and branches are dropped independently, samples by their own key
    assert np.abs(np.corrcoef(path_D2B[1:].reshape(8, num)) - np.eye(8)).max() < 0.06
    np.testing.assert_array_equal(draw_paths(model, keys[10:12]), path_D2B[..., 10:12])
    assert draw_paths(MODEL, keys) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"schedule": "both"}, "phases.schedule"),
        ({"ratio": 0}, "phases.ratio"),
        ({"label_drop_rate": 1.0}, "phases.label_drop_rate"),
        ({"label_smoothing": -0.1}, "phases.label_smoothing"),
    ],
)
def test_phase_options_out_of_range_are_refused(changes, field):
    with pytest.raises(InputError, match=f"^config.{field} must be .*, got ") as caught:
        PhaseOptions(**changes)
    assert caught.value.field == f"config.{field}"
