import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import (
    GRADIENTS,
    LOGITS,
    LOSSES,
    MVAR,
    VAR,
    assert_close,
    assert_gradients_close,
    load,
    load_json,
    published_transformer,
    quick_jit,
)
from jaxprs import traced
from small_case import MODEL, apply_phase, count, phase_logits, seeded_batch, seeded_params, shapes_of

from mvar_jax.errors import InputError
from mvar_jax.models.transformer import Transformer, previous_of
from mvar_jax.ops.losses import token_cross_entropy
from mvar_jax.ops.platform import compiling_for
from mvar_jax.scales import BLOCK_CAUSAL, KNOWN_SIDES, Phase

GOLDEN, GOLDEN_VAR = load("train"), load("var")
LABELS, NO_CLASS = (1, 3), (10, 10)
IDS = load("tokenizer")["ids"]


def log_sum_exp(logits) -> np.ndarray:
    return np.asarray(jax.nn.logsumexp(logits, -1))


def assert_logits_close(what: str, logits, golden: dict, prefix: str) -> None:
    logits = np.asarray(logits)
    assert_close(f"{what} logits", logits[:, golden[f"{prefix}pos"]], golden[f"{prefix}logits"], **LOGITS)
    assert_close(f"{what} lse", log_sum_exp(logits), golden[f"{prefix}lse"], **LOGITS)
    assert_close(f"{what} mean", logits.mean(dtype=np.float64), golden[f"{prefix}logits_mean"], **LOGITS)
    assert_close(f"{what} std", logits.std(dtype=np.float64, ddof=1), golden[f"{prefix}logits_std"], **LOGITS)
    np.testing.assert_array_equal(logits.argmax(-1), golden[f"{prefix}argmax"])


@pytest.mark.parametrize("i", [0, 1, 2])
def test_logits_of_every_phase_equal_golden(i, run_phases):
    logits = run_phases(LABELS)[i]["logits"]
    assert logits.dtype == jnp.float32
    assert_logits_close(f"phase {i}", logits, GOLDEN, f"p{i}_")


@pytest.mark.parametrize("i", [0, 1, 2])
def test_losses_of_every_phase_equal_golden(i, run_phases):
    result, phase = run_phases(LABELS)[i], MVAR.phases()[i]
    ids = IDS[:, phase.begin : phase.end]
    cross_entropy = token_cross_entropy(result["logits"], ids)
    smoothed = token_cross_entropy(result["logits"], ids, 0.1).mean(0).sum() / MVAR.pyramid.num_tokens
    assert_close(f"phase {i} token_ce", cross_entropy, GOLDEN[f"p{i}_token_ce"], **LOGITS)
    assert_close(f"phase {i} loss", result["loss"], GOLDEN[f"p{i}_loss"], **LOSSES)
    assert_close(f"phase {i} smoothed", smoothed, load("optim")["label_smooth0.1_loss"][i], **LOSSES)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_dropped_labels_of_every_phase_equal_golden(i, run_phases):
    result = run_phases(NO_CLASS)[i]
    ours = result["logits"][:, GOLDEN[f"p{i}_pos"]]
    assert_close(f"phase {i} dropped logits", ours, GOLDEN[f"p{i}_drop_logits"], **LOGITS)
    assert_close(f"phase {i} dropped loss", result["loss"], GOLDEN[f"p{i}_drop_loss"], **LOSSES)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_gradients_of_every_phase_equal_golden(i, run_phases):
    published = published_transformer(run_phases(LABELS)[i]["grads"])
    assert_gradients_close(f"phase {i} gradient", published, GOLDEN, f"p{i}_grad", GRADIENTS)
    assert (np.abs(published["pos_start"]).max() > 0) == (i == 0)


def test_block_causal_mask_over_the_coarse_phase_equals_golden(transformer_params, golden_batch):
    phase = Phase(0, 7, 0, 255, BLOCK_CAUSAL)
    previous = previous_of(golden_batch["previous"], phase, num_start=1)
    run = quick_jit(lambda params: VAR.apply({"params": params}, previous, jnp.asarray(LABELS), phase)[0])
    logits = run(transformer_params)
    assert_close("logits", logits[:, GOLDEN["p0_pos"]], GOLDEN["p0_varmask_logits"], **LOGITS)
    loss = token_cross_entropy(logits, IDS[:, :255]).mean(0).sum() / 680
    assert_close("loss", loss, GOLDEN["p0_varmask_loss"], **LOSSES)


def test_var_training_pass_equals_golden(run_var):
    result = run_var(LABELS)
    assert_logits_close("VAR", result["logits"], GOLDEN_VAR, "")
    assert_close("VAR loss", result["loss"], GOLDEN_VAR["loss"], **LOSSES)
    published = published_transformer(result["grads"])
    assert_gradients_close("VAR gradient", published, GOLDEN_VAR, "grad", GRADIENTS)
    dropped = run_var(NO_CLASS)["logits"][:, GOLDEN_VAR["pos"]]
    assert_close("VAR dropped logits", dropped, GOLDEN_VAR["drop_logits"], **LOGITS)


def test_var_view_keeps_the_parameter_tree():
    mvar, var = shapes_of(MVAR), shapes_of(VAR)
    assert jax.tree.structure(mvar) == jax.tree.structure(var)
    assert [x.shape for x in jax.tree.leaves(mvar)] == [x.shape for x in jax.tree.leaves(var)]


@pytest.mark.parametrize("name", [*(f"mvar_d{depth}_256" for depth in (16, 20, 24, 30)), "mvar_d30_512_saln"])
def test_parameter_counts_equal_the_published_models(name):
    _, depth, size, *shared = name.split("_")
    depth, sides = int(depth[1:]), KNOWN_SIDES[int(size)]
    model = Transformer(sides, 8, 7, 4096, 32, 1000, depth, 64 * depth, depth, shared_aln=bool(shared))
    params = shapes_of(model)
    expected = load_json("counts.json")["params"][name]
    assert count(params) == expected["total"]
    assert count(params["blocks"]) == expected["blocks"]
    adaptive = [params["shared_adaptive"], params["blocks"]["adaptive_offset"]] if shared else []
    adaptive += [params["head_adaptive"], params["blocks"].get("adaptive", {})]
    assert count(adaptive) == expected["ada"]


# Which tokens see which: derivatives of a phase's logits with respect to each token's input.


def sensitivity(model, phase):
    """bool [N, M]: whether the logits of token n have a derivative to the input of token m of the phase."""
    params, batch = seeded_params(model), seeded_batch(model, batch_size=1)

    def signature_N(previous):
        logits = apply_phase(model, phase, params, {**batch, "previous": previous})
        return jnp.sum(jnp.sin(logits), axis=(0, 2))

    derivative = np.asarray(quick_jit(jax.jacrev(signature_N))(batch["previous"]))[:, 0].any(-1)
    return previous_of(derivative, phase, model.pyramid.areas[0])


def test_coarse_tokens_depend_on_their_own_scale_only():
    model = MODEL.clone(refine_step=4)
    (phase,) = model.phases()
    level = model.pyramid.level_of_token()
    # the start token has no input
    np.testing.assert_array_equal(sensitivity(model, phase), level[:, None] == level[None, 1:])


def test_var_tokens_depend_on_their_own_and_all_coarser_scales():
    model = MODEL.clone(conditioning="full")
    (phase,) = model.phases()
    level = model.pyramid.level_of_token()
    np.testing.assert_array_equal(sensitivity(model, phase), level[:, None] >= level[None, 1:])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_fine_tokens_depend_on_their_own_window_only(backend):
    model = MODEL.clone(depth=1, refine_step=2, kernel_size=(1, 3), window_backend=backend)
    for phase, side, window in zip(model.phases()[1:], (4, 5), (1, 3), strict=True):
        start = np.clip(np.arange(side) - window // 2, 0, side - window)
        is_near = (start[:, None] <= np.arange(side)) & (np.arange(side) < start[:, None] + window)
        expected = np.einsum("yr,xc->yxrc", is_near, is_near).reshape(side**2, side**2)
        # a token's own input reaches it through the residual path as well
        np.testing.assert_array_equal(sensitivity(model, phase), expected)


def test_each_block_widens_the_view_by_half_a_window():
    model = MODEL.clone(sides=(1, 7), refine_step=1, depth=2)
    seen = sensitivity(model, model.phases()[1]).reshape(7, 7, 7, 7)
    np.testing.assert_array_equal(seen[3, 3].any(0), [False] + [True] * 5 + [False])


# Options.


def test_shared_adaptive_linear_equals_own_linears_with_tied_weights():
    shared = MODEL.clone(shared_aln=True)
    params, batch = seeded_params(shared), seeded_batch()
    assert params["shared_adaptive"]["kernel"].shape == (16, 6, 16)
    assert params["blocks"]["adaptive_offset"].shape == (2, 6, 16)
    linear, offset = params["shared_adaptive"], params["blocks"]["adaptive_offset"]
    adaptive = {"kernel": jnp.stack([linear["kernel"]] * 2), "bias": linear["bias"] + offset}
    tied = {**params, "blocks": {**params["blocks"], "adaptive": adaptive}}
    del tied["shared_adaptive"], tied["blocks"]["adaptive_offset"]
    phase = MODEL.phases()[0]
    expected = phase_logits(MODEL, phase, tied, batch)
    np.testing.assert_allclose(phase_logits(shared, phase, params, batch), expected, atol=1e-5)


def test_memory_and_speed_options_change_no_number():
    params, batch, phase = seeded_params(MODEL), seeded_batch(), MODEL.phases()[1]

    @functools.partial(quick_jit, static_argnums=0)
    def grads_of(model, params):
        return jax.grad(lambda params: jnp.sum(jnp.sin(apply_phase(model, phase, params, batch))))(params)

    ours, expected = grads_of(MODEL.clone(remat="full", scan_unroll=2), params), grads_of(MODEL, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


def test_drop_path_factors_scale_the_branches_of_their_block_and_sample():
    """A factor multiplies exactly one branch of one block and sample: 0 removes it, 1 keeps it, 2 doubles its gamma.

    Factors applied to another block, branch or sample, or to the residual itself, break one of the comparisons.
    """
    params, batch, phase = seeded_params(MODEL), seeded_batch(), MODEL.phases()[0]
    run = lambda params, path: np.asarray(phase_logits(MODEL, phase, params, batch, path))
    kept, dropped = jnp.ones((2, 2, 2)), jnp.zeros((2, 2, 2))
    np.testing.assert_allclose(run(params, kept), phase_logits(MODEL, phase, params, batch), atol=1e-5)
    # with every branch dropped the blocks' parameters have no effect
    other = {**params, "blocks": seeded_params(MODEL, seed=1)["blocks"]}
    nothing = run(params, dropped)
    np.testing.assert_array_equal(nothing, run(other, dropped))
    # one branch of sample 0 moves sample 0 alone
    for block, branch in np.ndindex(2, 2):
        has_moved = run(params, dropped.at[block, branch, 0].set(1.0)) != nothing
        assert has_moved[0].any() and not has_moved[1].any()
    # a factor of two is a gamma twice as large
    adaptive = jax.tree.map(lambda x: x.at[..., :2, :].multiply(2.0), params["blocks"]["adaptive"])
    doubled = {**params, "blocks": {**params["blocks"], "adaptive": adaptive}}
    np.testing.assert_allclose(run(params, 2 * kept), run(doubled, kept), atol=1e-5)


@pytest.mark.parametrize("size", [512, 1024])
def test_large_pyramids_give_logits_for_every_token(size):
    model = MODEL.clone(sides=KNOWN_SIDES[size], refine_step=8, kernel_size=7)
    shapes, num_tokens = shapes_of(model), 0
    assert shapes["pos_embed"].shape == (model.pyramid.num_tokens, 16)
    for phase in model.phases():
        previous = jax.ShapeDtypeStruct((1, phase.num_tokens - (phase.begin == 0), 4), jnp.float32)
        label = jax.ShapeDtypeStruct((1,), jnp.int32)
        run = lambda params, previous, label, phase=phase: model.apply({"params": params}, previous, label, phase)[0]
        logits = jax.eval_shape(run, shapes, previous, label)
        assert logits.shape == (1, phase.num_tokens, 16)
        num_tokens += logits.shape[1]
    assert num_tokens == sum(side**2 for side in KNOWN_SIDES[size])


# Initialisation.


def assert_spread(what: str, x, std: float) -> None:
    """Mean 0 and this std, within five standard errors."""
    x = np.asarray(x, np.float64)
    assert x.std() == pytest.approx(std, rel=5 / np.sqrt(2 * x.size)), what
    assert abs(x.mean()) < 5 * std / np.sqrt(x.size), what


UNDAMPED = {"shared_aln": True, "class_init_std": 0.3, "init_gamma": 1.0, "init_adaptive": 0.9, "init_head": 0.8}


@pytest.fixture(scope="module", params=[{}, UNDAMPED], ids=["own", "shared"])
def initial(request):
    """(model, parameters): an adaptive linear per block as published, or a shared one with other factors."""
    model = MVAR.clone(depth=3, width=32, vocab_size=128, **request.param)
    return model, nn.meta.unbox(quick_jit(model.init_params)(jax.random.key(0)))


def test_defaults_are_the_published_factors():
    assert (MVAR.init_head, MVAR.init_adaptive, MVAR.init_gamma, MVAR.class_init_std) == (0.02, 0.5, 1e-5, None)


def test_initial_weights_have_the_published_spread(initial):
    model, params = initial
    std, blocks = np.sqrt(1 / (3 * 32)), params["blocks"]
    for name in ("pos_start", "pos_embed", "level_embed"):
        assert_spread(name, params[name], std)
    assert_spread("class_embed", params["class_embed"], model.class_init_std or std)
    assert_spread("word_embed", params["word_embed"]["kernel"], std)
    assert_spread("head", params["head"]["kernel"], model.init_head * std)
    assert_spread("head_adaptive", params["head_adaptive"]["kernel"], model.init_adaptive * std)
    assert_spread("ffn up", blocks["ffn"]["up"]["kernel"], std)
    assert_spread("ffn down", blocks["ffn"]["down"]["kernel"], std / np.sqrt(2 * 3))
    assert_spread("proj", blocks["attention"]["proj"]["kernel"], std / np.sqrt(2 * 3))
    assert_spread("qkv", blocks["attention"]["qkv"], std)
    # layers differ from each other
    assert np.abs(np.corrcoef(blocks["attention"]["qkv"].reshape(3, -1)) - np.eye(3)).max() < 0.1


def test_initial_adaptive_parts_have_the_published_spread(initial):
    model, params = initial
    std = np.sqrt(1 / (3 * 32))
    if model.shared_aln:
        assert_spread("shared", params["shared_adaptive"]["kernel"], std)
        parts, std = params["blocks"]["adaptive_offset"], 1 / np.sqrt(32)
    else:
        parts = params["blocks"]["adaptive"]["kernel"]
    for i in range(6):
        factor = model.init_gamma if i < 2 else model.init_adaptive
        assert_spread(f"adaptive {i}", parts[..., i, :], std * factor)


def test_initial_biases_are_zero_and_attention_scales_four(initial):
    _, params = initial
    flat = jax.tree_util.tree_leaves_with_path(params)
    biases = [leaf for path, leaf in flat if "bias" in path[-1].key]
    assert len(biases) == 9 and not any(np.any(bias) for bias in biases)
    np.testing.assert_allclose(params["blocks"]["attention"]["log_scale"], np.log(4), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"conditioning": "half"}, "conditioning"),
        ({"remat": "some"}, "remat"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"refine_step": 5}, "refine_step"),
    ],
)
def test_check_refuses_fields_that_do_not_fit(changes, field):
    MODEL.check()
    with pytest.raises(InputError, match=f"^{field} must ") as caught:
        MODEL.clone(**changes).check()
    assert caught.value.field == field


def test_logits_for_a_gpu_are_those_for_a_cpu():
    """A GPU's products and sums are joined in another way; attention by the one backend that runs here too."""
    model = MODEL.clone(window_backend="dense", depth=1)
    params, batch = seeded_params(model), seeded_batch(model)
    phase = model.phases()[1]
    expected = phase_logits(model, phase, params, batch)
    with compiling_for("gpu"):
        np.testing.assert_allclose(phase_logits(model, phase, params, batch), expected, atol=2e-6)


@pytest.mark.parametrize(("num_rows", "dtype"), [(2, jnp.float32), (4, jnp.bfloat16)])
def test_on_a_gpu_the_bias_before_gelu_is_added_in_float32_if_tokens_are_fewer_than_the_width(num_rows, dtype):
    """5 tokens a row, width 16: with few tokens cuBLAS' own sum costs more, a copy of the weights."""
    model = MODEL.clone(dtype=jnp.bfloat16)
    batch = seeded_batch(model, num_rows)
    with compiling_for("gpu"):
        found = traced(functools.partial(apply_phase, model, model.phases()[0]), shapes_of(model), batch)
    sums = {e.outvars[0].aval.dtype for e, scope in found if e.primitive.name == "add" and scope.endswith("/ffn/up")}
    assert sums == {jnp.dtype(dtype)}
