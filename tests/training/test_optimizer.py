import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import TRANSFORMER_ENTRIES, load

from mvar_jax.errors import InputError
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients, clip_by_norm, decay_mask
from mvar_jax.training.state import make_state

OPTIONS = OptimizerOptions(clip_norm=2.0, ema_decay=0.9)
PARAMS = {
    "word_embed": {"kernel": jnp.asarray([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.asarray([0.3, -0.4])},
    "pos_start": jnp.asarray([[0.7, -0.6]]),
}
GRADS = {
    "word_embed": {"kernel": jnp.asarray([[3.0, 0.1], [-2.0, 0.0]]), "bias": jnp.asarray([1.0, -0.2])},
    "pos_start": jnp.asarray([[0.5, 2.0]]),
}


def leaf_at(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


def test_decayed_parameters_equal_golden(transformer_params):
    mask = decay_mask(transformer_params)
    for entry in TRANSFORMER_ENTRIES:
        is_decayed = leaf_at(mask, entry.path)
        names = load("optim")["decay_names" if is_decayed else "no_decay_names"]
        assert set(entry.published) <= set(names.tolist()), entry.path


def test_clipping_scales_by_the_norm_plus_a_millionth():
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    clipped, norm = clip_by_norm(grads, 2.0)
    assert norm == 5
    np.testing.assert_allclose(clipped["b"], 4 * 2 / (5 + 1e-6), rtol=1e-6)
    np.testing.assert_array_equal(clip_by_norm(grads, 6.0)[0]["a"], grads["a"])
    np.testing.assert_array_equal(clip_by_norm(grads, 0)[0]["a"], grads["a"])
    # the millionth matters only for a norm as small
    clipped, _ = clip_by_norm(jax.tree.map(lambda g: g * 2e-7, grads), 1e-6)
    np.testing.assert_allclose(clipped["a"][0], 6e-7 / 2, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("options", "trains_start"))
def step(state, grads, learning_rate=0.01, weight_decay=0.05, options=OPTIONS, trains_start=True):
    return apply_gradients(options, state, grads, learning_rate, weight_decay, trains_start)


def new_state(options=OPTIONS):
    return make_state(lambda: PARAMS, options)


def adamw(param, grads, decay, learning_rate=0.01):
    """The published update in float64, one gradient a step."""
    m = v = 0.0
    for i, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        param = param * (1 - learning_rate * decay)
        param = param - learning_rate * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8)
    return param


def test_two_steps_equal_the_published_update():
    state, second = new_state(), jax.tree.map(lambda g: 0.1 - 0.3 * g, GRADS)
    emas = [state.params["pos_start"]]
    for grads in (GRADS, second):
        state, metrics = step(state, grads)
        emas.append(0.9 * emas[-1] + 0.1 * state.params["pos_start"])
    assert int(state.step) == 2 and metrics["is_bad"] == 0
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))) for grads in (GRADS, second)]
    assert metrics["grad_norm"] == pytest.approx(norms[1], rel=1e-6)
    factors = [min(1, 2 / (norm + 1e-6)) for norm in norms]
    for path, decay in ((("word_embed", "kernel"), 0.05), (("word_embed", "bias"), 0), (("pos_start",), 0)):
        pick = lambda tree, path=path: np.asarray(leaf_at(tree, path), np.float64)
        clipped = [factor * pick(grads) for factor, grads in zip(factors, (GRADS, second), strict=True)]
        np.testing.assert_allclose(pick(state.params), adamw(pick(PARAMS), clipped, decay), rtol=1e-6)
    np.testing.assert_allclose(state.ema["pos_start"], emas[-1], rtol=1e-6)


def test_start_position_stands_still_in_window_phases():
    first, _ = step(new_state(), GRADS)
    grads = {**GRADS, "pos_start": jnp.zeros((1, 2))}
    second, _ = step(first, grads, trains_start=False)
    np.testing.assert_array_equal(second.params["pos_start"], first.params["pos_start"])
    assert (second.params["word_embed"]["kernel"] != first.params["word_embed"]["kernel"]).any()
    before, after = (state.opt_state.inner_states for state in (first, second))
    jax.tree.map(np.testing.assert_array_equal, before["start"], after["start"])
    # its own step count continues from there
    third, _ = step(second, GRADS)
    skipped, _ = step(first, GRADS)
    np.testing.assert_array_equal(third.params["pos_start"], skipped.params["pos_start"])
    assert (third.params["word_embed"]["bias"] != skipped.params["word_embed"]["bias"]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_leaves_everything_but_the_step(bad):
    first, _ = step(new_state(), GRADS)
    second, metrics = step(first, {**GRADS, "pos_start": jnp.asarray([[bad, 0.0]])})
    assert metrics["is_bad"] == 1 and int(second.step) == 2
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(second, name), getattr(first, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_loss_leaves_everything_but_the_step_though_its_gradient_is_finite(bad):
    first, _ = step(new_state(), GRADS)
    second, metrics = jax.jit(lambda state: apply_gradients(OPTIONS, state, GRADS, 0.01, 0.05, loss=bad))(first)
    assert metrics["is_bad"] == 1 and int(second.step) == 2
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(second, name), getattr(first, name))


def test_no_moving_average_is_kept_where_it_is_off():
    options = OptimizerOptions()
    state, _ = step(new_state(options), GRADS, options=options)
    assert state.ema is None


def test_a_ramped_average_forgets_the_initial_weights_early():
    options = OptimizerOptions(ema_decay=0.3, ema_ramp=True)
    state = new_state(options)
    average = np.asarray(state.params["pos_start"], np.float64)
    for decay in (0.1, 1.5 / 10.5, 2 / 11, 2.5 / 11.5, 3 / 12, 3.5 / 12.5, 0.3):  # 4 / 13 is above 0.3
        state, _ = step(state, GRADS, options=options)
        average = decay * average + (1 - decay) * np.asarray(state.params["pos_start"])
    np.testing.assert_allclose(state.ema["pos_start"], average, rtol=1e-5)
    with pytest.raises(InputError, match="config.optimizer.ema_ramp must be False with config.optimizer.ema_decay=0"):
        OptimizerOptions(ema_ramp=True)
