import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import (
    F_HAT,
    GUIDED_LOGITS,
    MVAR,
    SIDES,
    TOKENIZER,
    assert_close,
    assert_images_close,
    channels_first,
    load,
    quick_jit,
)
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jaxprs import traced

from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.pixels import to_levels
from mvar_jax.ops.quantize import teacher_forcing_input
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.ops.sampling import filter_logits, guide
from mvar_jax.sampling.sampler import SampleOptions, draw_scale, modulations, sample, sample_pyramid
from mvar_jax.sharding import MESH_AXES


def assert_draw_close(what: str, draw, golden: dict, prefix: str = "") -> None:
    ids, f_hat, all_logits = draw
    np.testing.assert_array_equal(ids, golden[f"{prefix}ids"])
    assert_close(f"{what} f_hat", channels_first(f_hat), golden[f"{prefix}f_hat"], **F_HAT)
    for scale, logits in enumerate(all_logits):
        key = f"{prefix}logits{scale}"
        assert_close(f"{what} logits {scale}", logits[:, golden[f"{key}_pos"]], golden[key], **GUIDED_LOGITS)
        if f"{key}_mean" in golden:
            logits = np.asarray(logits, np.float64)
            assert_close(f"{what} mean {scale}", logits.mean(), golden[f"{key}_mean"], **GUIDED_LOGITS)
            assert_close(f"{what} std {scale}", logits.std(ddof=1), golden[f"{key}_std"], **GUIDED_LOGITS)


@pytest.mark.parametrize("cfg", [1.0, 2.7])
def test_greedy_sampling_equals_golden(cfg, draw_golden, decode):
    golden = load(f"sample_cfg{cfg}")
    draw = draw_golden("mvar", golden["labels"], SampleOptions(cfg, top_k=1))
    assert_draw_close(f"cfg {cfg}", draw, golden)
    assert_images_close(f"cfg {cfg} image", decode(draw[1]), golden, "img", grid=8)


@pytest.mark.parametrize("cfg", [1.0, 1.5, 2.7])
def test_cached_var_sampling_equals_golden(cfg, draw_golden, decode):
    golden = load("var")
    draw = draw_golden("var", golden[f"cfg{cfg}_labels"], SampleOptions(cfg, top_k=1))
    assert_draw_close(f"VAR cfg {cfg}", draw, golden, f"cfg{cfg}_")
    assert_images_close(f"VAR cfg {cfg} image", (decode(draw[1]) + 1) / 2, golden, f"cfg{cfg}_img01", grid=8)


def test_the_compiled_program_draws_the_golden_ids(transformer_params, tokenizer_params):
    golden = load("sample_cfg2.7")
    options = SampleOptions(cfg=2.7, top_k=1)
    ids, f_hat = sample(
        Networks(TOKENIZER, tokenizer_params, MVAR, transformer_params),
        jnp.asarray(golden["labels"]),
        keys_of_samples(5, np.arange(2)),
        options,
    )
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, golden["ids"])
    assert_close("f_hat", channels_first(f_hat), golden["f_hat"], **F_HAT)


filter_quickly = quick_jit(filter_logits, static_argnums=(1, 2))


def full_noise(scale: int) -> np.ndarray:
    exponential = np.random.RandomState(4242 + scale).exponential(size=(2, SIDES[scale] ** 2, 64))
    return -np.log(exponential.astype(np.float32))


@pytest.mark.parametrize("name", ["nofilter", "topk20p90"])
def test_gumbel_average_equals_golden(name, draw_golden):
    golden = load(f"more_smooth_{name}")
    options = SampleOptions(2.7, int(golden["top_k"]), float(golden["top_p"]), smooth=True)
    noises = [full_noise(scale) for scale in range(10)]
    for scale, noise in enumerate(noises):
        np.testing.assert_allclose(noise[:, :4], golden[f"gumbel{scale}"], rtol=1e-6, atol=1e-6)
    given = {noise.shape[1]: noise for noise in noises}
    _, f_hat, all_logits = draw_golden("mvar", golden["labels"], options, lambda x_BNV, keys_B: given[x_BNV.shape[1]])
    for scale, logits in enumerate(all_logits):
        ours = np.asarray(filter_quickly(logits, options.top_k, options.top_p))[:, :4] * golden["logit_mul"][scale]
        expected = golden[f"scaled_filtered_logits{scale}"]
        is_kept = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(ours), is_kept)
        if scale < 5:  # later ones inherit an ill-conditioned f_hat
            assert_close(f"{name} logits {scale}", ours[is_kept], expected[is_kept], atol=1e-4)
    difference = channels_first(f_hat) - golden["f_hat"]
    assert np.sqrt(np.mean(np.square(difference))) <= 3e-3
    assert np.abs(difference).max() <= 0.1


# Properties, on a small model.

SMALL_SIDES = (1, 2, 3)
MODEL = small_case.MODEL.clone(sides=SMALL_SIDES)
SMALL_TOKENIZER = small_case.TOKENIZER.clone(sides=SMALL_SIDES)
PARAMS = small_case.seeded_params(MODEL)
TOKENIZER_PARAMS = small_case.seeded_params(SMALL_TOKENIZER, std=1.0)
NETWORKS = Networks(SMALL_TOKENIZER, TOKENIZER_PARAMS, MODEL, PARAMS)
# `sample`, compiled faster
draw_quickly = quick_jit(sample.__wrapped__, static_argnames=("options", "outputs"))
OPTIONS = SampleOptions(cfg=1.5, top_k=12, top_p=0.95)


def draw_small(labels, index, seed=0, options=OPTIONS, model=MODEL) -> np.ndarray:
    keys_B = keys_of_samples(seed, index)
    ids, _ = draw_quickly(NETWORKS.replace(transformer=model), jnp.asarray(labels), keys_B, options)
    return np.asarray(ids)


@pytest.mark.parametrize(
    ("model", "options"),
    [(MODEL, OPTIONS), (MODEL.clone(conditioning="full"), SampleOptions(cfg=1.0, smooth=True))],
    ids=["markov", "full smooth"],
)
def test_a_sample_is_a_function_of_its_label_seed_and_index(model, options):
    """A sample has the same ids alone, in another order and twice in one batch; each of label, seed, index matters.

    Ids are discrete, so equality is exact. A key that depends on the batch, or one that is reused, breaks it.
    """
    labels, index = np.array([0, 1, 2, 0, 1, 2, 0]), np.array([0, 1, 2, 3, 40, 50, 0])
    together = draw_small(labels, index, options=options, model=model)
    alone = draw_small(labels[3:4], index[3:4], options=options, model=model)
    np.testing.assert_array_equal(alone[0], together[3])
    np.testing.assert_array_equal(draw_small(labels[::-1], index[::-1], options=options, model=model)[::-1], together)
    np.testing.assert_array_equal(together[6], together[0])
    assert (together[3] != together[0]).any()
    assert (draw_small(labels, index, seed=1, options=options, model=model) != together).any(1).all()
    assert (draw_small((labels + 1) % 3, index, options=options, model=model) != together).any(1).all()


@pytest.fixture(scope="module")
def stub_draws():
    """Samples of a stub whose logits leave no choice but given ids: drawn, and as a Gumbel average."""
    ids = np.random.default_rng(0).integers(0, 16, (2, MODEL.pyramid.num_tokens))
    offsets, seen = MODEL.pyramid.offsets, []

    def stub(scale, previous_BNc, carry):
        seen.append(previous_BNc)
        assert carry == (None if scale == 0 else scale - 1)
        return 500 * jax.nn.one_hot(ids[:, offsets[scale] : offsets[scale + 1]], 16), scale

    def run(options):
        seen.clear()
        keys_B = keys_of_samples(0, np.arange(2))
        drawn, f_hat, _ = sample_pyramid(stub, NETWORKS, keys_B, options)
        return drawn, f_hat, list(seen)

    exact, smooth = quick_jit(lambda: (run(SampleOptions()), run(SampleOptions(smooth=True))))()
    return ids, exact, smooth


def test_each_scale_sees_what_the_coarser_ones_drew(stub_draws):
    ids, (drawn, f_hat, seen), _ = stub_draws
    np.testing.assert_array_equal(drawn, ids)
    f_hats = quick_jit(lambda ids: SMALL_TOKENIZER.apply({"params": TOKENIZER_PARAMS}, ids, method="f_hats"))(ids)
    np.testing.assert_allclose(f_hat, f_hats[-1], atol=1e-5)
    assert seen[0].shape == (2, 0, 4)
    previous = teacher_forcing_input(f_hats, SMALL_TOKENIZER.sides)
    np.testing.assert_allclose(np.concatenate(seen, 1), previous, atol=1e-5)


def test_a_sharp_gumbel_average_adds_the_drawn_codewords(stub_draws):
    _, (_, exact, _), (_, smooth, _) = stub_draws
    np.testing.assert_allclose(smooth, exact, atol=1e-5)


def test_each_scale_draws_its_own_noise():
    """With one key for all scales, flat logits would give every scale the same first ids."""

    @quick_jit
    def run():
        flat = lambda scale, previous, carry: (jnp.zeros((2, SMALL_SIDES[scale] ** 2, 16)), None)
        keys_B = keys_of_samples(0, np.arange(2))
        return sample_pyramid(flat, NETWORKS, keys_B, SampleOptions())[0]

    _, second, third = np.split(np.asarray(run()), (1, 5), axis=1)
    assert (third[:, :4] != second).any(1).all()


@pytest.mark.parametrize("is_shared", [False, True])
def test_precomputed_modulation_gives_the_logits_of_labels_guided_or_not(is_shared):
    model = MODEL.clone(shared_aln=is_shared)
    params = small_case.seeded_params(model)
    phase = model.pyramid.scale_phase(1)
    previous = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4)), jnp.float32)

    @quick_jit
    def run():
        plain, _ = model.apply({"params": params}, previous, jnp.array([0, 3, 2, 3]), phase)
        parts = modulations(model, params, jnp.array([0, 2]), is_guided=True)
        apply = lambda *guidance: model.apply({"params": params}, previous, None, phase, None, None, parts, *guidance)
        return plain, apply()[0], apply(1.5)[0]

    plain, ours, guided = run()
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    np.testing.assert_allclose(guided, guide(plain[0::2], plain[1::2], 1.5), atol=2e-5)
    assert np.abs(plain[0] - plain[2]).max() > 0.1


@pytest.mark.parametrize(("data", "num_products"), [(1, 1), (2, 2)])
def test_labels_and_no_class_are_one_product_unless_a_mesh_splits_the_batch(data, num_products):
    mesh = AbstractMesh((data, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with use_abstract_mesh(mesh):
        found = traced(lambda labels_B: modulations(MODEL, PARAMS, labels_B, is_guided=True), jnp.arange(4))
    widths = [e.outvars[0].aval.shape[1] for e, _ in found if e.primitive.name == "dot_general"]
    assert widths == [6 * MODEL.width, 2 * MODEL.width] * num_products


def test_a_model_that_was_trained_without_a_loop_over_blocks_is_sampled_with_one():
    """Ten scales with a copy of every block each did not compile within minutes on a GPU."""

    def program(scan_unroll: int) -> str:
        networks = NETWORKS.replace(transformer=MODEL.clone(scan_unroll=scan_unroll))
        draw = lambda labels_B, keys_B: sample(networks, labels_B, keys_B, OPTIONS)
        return jax.jit(draw).lower(jnp.arange(2), keys_of_samples(0, np.arange(2))).as_text()

    assert program(MODEL.depth) == program(1)


def test_bfloat16_weights_draw_too():
    kind, keys_B = jnp.bfloat16, keys_of_samples(0, np.arange(3))
    params = jax.tree.map(lambda x: x.astype(kind), PARAMS)
    networks = Networks(SMALL_TOKENIZER.clone(dtype=kind), TOKENIZER_PARAMS, MODEL.clone(dtype=kind), params)
    ids, images = draw_quickly(networks, jnp.arange(3), keys_B, OPTIONS, ("ids", "images"))
    assert images.dtype == jnp.float32 and np.isfinite(images).all()
    assert np.mean(np.asarray(ids) == draw_small(np.arange(3), np.arange(3))) > 0.5


def test_the_outputs_of_one_program_agree():
    keys_B = keys_of_samples(0, np.arange(5))
    arguments = (NETWORKS, jnp.arange(5) % 3, keys_B, OPTIONS)
    names = ("pixels", "floor_pixels", "images", "f_hat", "ids")
    pixels, floor_pixels, images, f_hat, ids = map(np.asarray, draw_quickly(*arguments, names))
    np.testing.assert_array_equal(ids, draw_small(np.arange(5) % 3, np.arange(5)))
    decoded = quick_jit(lambda x: SMALL_TOKENIZER.apply({"params": TOKENIZER_PARAMS}, x, method="decode"))(f_hat)
    np.testing.assert_allclose(images, decoded, atol=1e-5)
    assert pixels.dtype == floor_pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, to_levels(images))
    np.testing.assert_array_equal(floor_pixels, to_levels(images, truncate=True))
    assert set(np.unique(pixels - floor_pixels)) == {0, 1}


@pytest.mark.parametrize("smooth", [False, True])
def test_temperature_divides_the_logits_before_the_filters(smooth):
    rng = np.random.default_rng(0)
    logits, codebook = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 30, 16), (16, 4)))
    noise = lambda logits, keys: jnp.zeros_like(logits)

    @functools.partial(quick_jit, static_argnums=1)
    def draw(logits, temperature):
        options = SampleOptions(top_k=9, top_p=0.8, smooth=smooth, temperature=temperature)
        return draw_scale(logits, keys_of_samples(0, np.arange(2)), codebook, options, 1, 3, noise)

    warm = draw(logits, 4.0)
    jax.tree.map(np.testing.assert_array_equal, warm, draw(logits / 4, 1.0))
    assert all((a != b).any() for a, b in zip(warm, draw(logits, 1.0), strict=True))


def test_each_scale_has_its_own_temperature():
    """Ids are those of each scale's logits over its temperature, with the noise that the scale has anyway."""
    rng, temperatures = np.random.default_rng(0), (3.0, 0.5, 1.5)
    logits = [jnp.asarray(rng.normal(size=(2, side**2, 16)), jnp.float32) for side in SMALL_SIDES]

    @functools.partial(quick_jit, static_argnums=1)
    def run(logits, temperature):
        stub = lambda scale, previous, carry: (logits[scale], None)
        keys_B = keys_of_samples(0, np.arange(2))
        return sample_pyramid(stub, NETWORKS, keys_B, SampleOptions(temperature=temperature))[0]

    ids = run(logits, temperatures)
    divided = [x / temperature for x, temperature in zip(logits, temperatures, strict=True)]
    np.testing.assert_array_equal(ids, run(divided, 1.0))
    assert (ids != run(logits, 1.0)).any()
    with pytest.raises(InputError, match="^temperature must be one number or 3, one for each scale, got 2"):
        run(logits, (1.0, 2.0))


def test_temperatures_are_numbers_of_any_library():
    assert SampleOptions(temperature=np.array([1.5])) == SampleOptions(temperature=1.5)
    assert SampleOptions(temperature=jnp.array([2, 1])).temperature == (2.0, 1.0)
    for wrong, given in (([1, float("nan")], "nan"), ((1.0, -2), "-2"), ([1, "2"], "'2'")):
        with pytest.raises(InputError, match=f"^temperature must be .*from 1e-6 to 1e6 .*, got {given}"):
            SampleOptions(temperature=wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cfg", -0.1),
        ("cfg", float("nan")),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("top_p", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
    ],
)
def test_options_out_of_range_cannot_be_made(field, value):
    SampleOptions(cfg=0.0, top_k=0, top_p=1.0)
    with pytest.raises(InputError, match=f"^{field} must be .*, got {value}$") as caught:
        SampleOptions(**{field: value})
    assert caught.value.field == field
