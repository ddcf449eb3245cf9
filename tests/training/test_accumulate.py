import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit
from small_case import MODEL, TOKENIZER, seeded_batch, seeded_params

from mvar_jax.models.networks import Networks
from mvar_jax.training import tokenizer_step
from mvar_jax.training.accumulate import split_parts, value_and_grad_over_parts
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, train_step
from mvar_jax.training.transformer_task import with_input

OPTIMIZER = OptimizerOptions()


def test_parts_take_rows_with_a_stride_and_paths_along_their_own_axis():
    batch = {"ids": jnp.arange(6), "path": jnp.arange(12).reshape(1, 2, 6), "none": None}
    parts = split_parts(batch, 3)
    np.testing.assert_array_equal(parts["ids"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts["path"][1], [[[1, 4], [7, 10]]])
    assert "none" not in parts


def test_mean_over_parts_is_the_mean_over_the_batch():
    def loss_fn(w, batch):
        error_B = (w * batch["x"] - 1) ** 2
        return error_B.mean(), {"error": error_B.mean(), "x": batch["x"].mean()}

    batch = {"x": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
    whole = value_and_grad_over_parts(loss_fn, jnp.float32(0.7), batch, 1)
    parts = value_and_grad_over_parts(loss_fn, jnp.float32(0.7), batch, 2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), parts, whole)


def transformer_case():
    model = MODEL.clone(sides=(1, 2), refine_step=2, depth=1, drop_path_rate=0.5)
    batch = {name: x for name, x in seeded_batch(model, 4).items() if name != "previous"}
    embed = lambda ids_BL: jnp.sin(ids_BL[:, 1:, None] * jnp.arange(1.0, 5))
    options = PhaseOptions(schedule="joint", label_drop_rate=0.5)

    def step(state, batch, *rates, num_parts):
        recipe = TransformerRecipe(model, OPTIMIZER, options, num_parts=num_parts)
        return train_step(recipe, model.phases(), state, {**batch, "previous": embed(batch["ids"])}, *rates)

    return model, batch, step, {}


def tokenizer_case():
    model = TOKENIZER.clone(sides=(2,), ch_mult=(1,), num_phi=1)
    batch = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), np.uint8))}

    def step(state, batch, *rates, num_parts):
        recipe = tokenizer_step.TokenizerRecipe(model, OPTIMIZER, CodebookOptions(), num_parts)
        return tokenizer_step.train_step(recipe, state, batch, *rates)

    return model, batch, step, {"hits": jnp.zeros((1, model.vocab_size))}


@pytest.mark.parametrize("make_case", [transformer_case, tokenizer_case])
def test_accumulated_step_equals_the_whole_one(make_case):
    model, batch, step, extra = make_case()
    state = make_state(lambda: seeded_params(model), OPTIMIZER, extra)
    results = [
        quick_jit(functools.partial(step, num_parts=parts))(state, batch, np.float32(0.01), np.float32(0.05))
        for parts in (1, 2)
    ]
    (whole, metrics), (accumulated, metrics_again) = results
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), metrics_again, metrics)
    # the moments and not the weights: Adam's first step is nearly the gradient's sign, and magnifies rounding
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, accumulated.opt_state, whole.opt_state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), accumulated.extra, whole.extra)


def test_images_are_encoded_in_parts_too():
    """The ids are those of the whole batch, and the encoder's memory that of a part."""
    networks = Networks(TOKENIZER, seeded_params(TOKENIZER))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 10, 10, 3), np.uint8))
    compiled = {
        num: jax.jit(lambda images, num=num: with_input(networks, {"image": images}, num)).lower(images).compile()
        for num in (64, 4)
    }
    whole, parts = (compiled[num](images) for num in (64, 4))
    np.testing.assert_array_equal(parts["ids"], whole["ids"])
    whole_bytes, part_bytes = (compiled[num].memory_analysis().temp_size_in_bytes for num in (64, 4))
    assert part_bytes < whole_bytes / 4
