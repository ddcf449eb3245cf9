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
)
from small_case import MODEL, count, seeded_batch, seeded_params, shapes_of

from mvar_jax.errors import InputError
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.losses import token_cross_entropy
from mvar_jax.scales import BLOCK_CAUSAL, KNOWN_SIDES, Phase
from mvar_jax.training.transformer_step import previous_of

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
    cross_entropy = token_cross_entropy(result["logits"], IDS[:, phase.begin : phase.end])
    assert_close(f"phase {i} token_ce", cross_entropy, GOLDEN[f"p{i}_token_ce"], **LOGITS)
    assert_close(f"phase {i} loss", result["loss"], GOLDEN[f"p{i}_loss"], **LOSSES)
    assert_close(f"phase {i} smoothed", result["smoothed_loss"], load("optim")["label_smooth0.1_loss"][i], **LOSSES)


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
    run = jax.jit(lambda params: VAR.apply({"params": params}, previous, jnp.asarray(LABELS), phase)[0])
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


@pytest.mark.parametrize("depth", [12, 16, 20, 24, 30])
@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_parameter_counts_equal_the_published_models(depth, size, shared_aln):
    name = f"mvar_d{depth}_{size}" + ("_saln" if shared_aln else "")
    if name not in load_json("counts.json")["params"]:
        pytest.skip("not published")
    model = Transformer(KNOWN_SIDES[size], 8, 7, 4096, 32, 1000, depth, 64 * depth, depth, shared_aln=shared_aln)
    params = shapes_of(model)
    expected = load_json("counts.json")["params"][name]
    assert count(params) == expected["total"]
    assert count(params["blocks"]) == expected["blocks"]
    adaptive = params["shared_adaptive"] if shared_aln else params["blocks"]["adaptive"]
    assert count([adaptive, params["head_adaptive"]]) == expected["ada"]


# Which tokens see which: derivatives of a phase's logits with respect to each token's input.


def sensitivity(model, phase):
    """bool [N, M]: whether the logits of token n depend on the input of token m, by exact derivatives."""
    params, batch = seeded_params(model), seeded_batch(model, batch_size=1)

    def signature_N(previous):
        logits, _ = model.apply({"params": params}, previous, batch["label"], phase)
        return jnp.sum(jnp.sin(logits), axis=(0, 2))

    previous = previous_of(batch["previous"], phase, model.pyramid.areas[0])
    return np.asarray(jax.jit(jax.jacrev(signature_N))(previous) != 0).any((1, 3))


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


def logits_of(model, params, phase, batch, path=None):
    run = jax.jit(
        lambda params, previous, path: model.apply({"params": params}, previous, batch["label"], phase, path)[0]
    )
    return np.asarray(run(params, previous_of(batch["previous"], phase, 1), path))


def test_shared_adaptive_linear_equals_own_linears_with_tied_weights():
    shared = MODEL.clone(shared_aln=True)
    params, batch = seeded_params(shared), seeded_batch()
    assert params["shared_adaptive"]["kernel"].shape == (16, 6, 16)
    assert params["blocks"]["adaptive_offset"].shape == (2, 6, 16)
    tied = {name: value for name, value in params.items() if name != "shared_adaptive"}
    blocks = {name: value for name, value in params["blocks"].items() if name != "adaptive_offset"}
    linear = params["shared_adaptive"]
    blocks["adaptive"] = {
        "kernel": jnp.stack([linear["kernel"]] * 2),
        "bias": linear["bias"] + params["blocks"]["adaptive_offset"],
    }
    phase = MODEL.phases()[0]
    expected = logits_of(MODEL, {**tied, "blocks": blocks}, phase, batch)
    np.testing.assert_allclose(logits_of(shared, params, phase, batch), expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}])
def test_memory_and_speed_options_change_no_number(changes):
    params, batch, phase = seeded_params(MODEL), seeded_batch(), MODEL.phases()[1]

    def grads_of(model):
        loss_fn = lambda params: jnp.sum(
            jnp.sin(model.apply({"params": params}, batch["previous"][:, 4:20], batch["label"], phase)[0])
        )
        return jax.tree.leaves(jax.jit(jax.grad(loss_fn))(params))

    for ours, expected in zip(grads_of(MODEL.clone(**changes)), grads_of(MODEL), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_drop_path_factors_scale_both_branches_of_their_block_and_sample():
    params, batch, phase = seeded_params(MODEL), seeded_batch(), MODEL.phases()[1]
    kept, dropped = jnp.ones((2, 2, 2)), jnp.zeros((2, 2, 2))
    full = logits_of(MODEL, params, phase, batch)
    np.testing.assert_allclose(logits_of(MODEL, params, phase, batch, kept), full, atol=1e-6)
    # with every branch dropped the blocks' parameters have no effect
    other = {**params, "blocks": seeded_params(MODEL, seed=1)["blocks"]}
    nothing = logits_of(MODEL, params, phase, batch, dropped)
    np.testing.assert_array_equal(nothing, logits_of(MODEL, other, phase, batch, dropped))
    # one branch of sample 0 alone moves sample 0 alone
    for block, branch in np.ndindex(2, 2):
        moved = logits_of(MODEL, params, phase, batch, dropped.at[block, branch, 0].set(1.0)) != nothing
        assert moved[0].any() and not moved[1].any()


def test_drop_path_doubles_a_branch_whose_factor_is_two():
    model, batch = MODEL.clone(depth=1), seeded_batch()
    params, phase = seeded_params(model), MODEL.phases()[1]
    blocks = params["blocks"]
    doubled = jax.tree.map(lambda x: x, blocks)
    doubled["adaptive"] = jax.tree.map(lambda x: x.at[..., :2, :].multiply(2.0), blocks["adaptive"])
    expected = logits_of(model, {**params, "blocks": doubled}, phase, batch)
    ours = logits_of(model, params, phase, batch, jnp.full((1, 2, 2), 2.0))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


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


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def initial(request):
    model = MVAR.clone(depth=3, width=32, vocab_size=128, init_gamma=1e-3, shared_aln=request.param)
    boxed = jax.jit(model.init_params)(jax.random.key(0))
    return model, jax.tree.map(
        np.asarray, jax.tree.map(lambda x: x.value, boxed, is_leaf=lambda x: hasattr(x, "names"))
    )


def test_initial_weights_have_the_published_spread(initial):
    model, params = initial
    std, blocks = np.sqrt(1 / (3 * 32)), params["blocks"]
    for name in ("class_embed", "pos_start", "pos_embed", "level_embed"):
        assert_spread(name, params[name], std)
    assert_spread("word_embed", params["word_embed"]["kernel"], std)
    assert_spread("head", params["head"]["kernel"], 0.02 * std)
    assert_spread("head_adaptive", params["head_adaptive"]["kernel"], 0.5 * std)
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
        assert_spread(f"adaptive {i}", parts[..., i, :], std * (1e-3 if i < 2 else 0.5))


def test_initial_biases_are_zero_and_attention_scales_four(initial):
    _, params = initial
    zeros = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if "bias" in path[-1].key]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path in zeros:
            np.testing.assert_array_equal(leaf, 0)
    assert len(zeros) == 9
    np.testing.assert_allclose(params["blocks"]["attention"]["log_scale"], np.log(4), rtol=1e-6)


def test_class_table_and_damping_can_be_chosen():
    model = MODEL.clone(num_classes=50, class_init_std=1.0, init_gamma=1.0, init_adaptive=1.0, init_head=1.0)
    params = jax.tree.map(
        lambda x: x.value,
        jax.jit(model.init_params)(jax.random.key(1)),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    std = np.sqrt(1 / (3 * 16))
    assert_spread("class_embed", params["class_embed"], 1 - 0.12)  # the normal is cut at +-2
    for name in ("head", "head_adaptive"):
        assert_spread(name, params[name]["kernel"], std)
    assert_spread("adaptive", params["blocks"]["adaptive"]["kernel"], std)


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
    with pytest.raises(InputError, match=f"^{field}="):
        MODEL.clone(**changes).check()
