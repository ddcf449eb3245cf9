"""The refiner in the real sampler: what a sample is a function of, and what it is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import quick_jit

from mvar_jax.errors import InputError
from mvar_jax.models import draw_order
from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import Refiner
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.ops.sampling import guidance_strength, guide, gumbel_noise
from mvar_jax.sampling.analysis import score_classes, teacher_forced_logits
from mvar_jax.sampling.editing import known_tokens
from mvar_jax.sampling.sampler import SampleOptions, guided_logits, sample, sample_pyramid

SIDES = (2, 4)
MODEL = small_case.MODEL.clone(sides=SIDES, depth=1)
TOKENIZER = small_case.TOKENIZER.clone(sides=SIDES)
REFINER = Refiner(SIDES, vocab_size=16, code_width=4, width=16, num_heads=2, depth=1)
WEIGHTS = {
    "tokenizer": small_case.seeded_params(TOKENIZER, std=1.0),
    "transformer": small_case.seeded_params(MODEL),
    "refiner": small_case.seeded_params(REFINER),
}
OPTIONS = SampleOptions(cfg=3.0, top_k=12, temperature=1.2)


def networks_of(window: int | None = 3, **changes) -> Networks:
    modules = {"tokenizer": TOKENIZER, "transformer": MODEL.clone(**changes), "refiner": REFINER.clone(window=window)}
    weights = WEIGHTS if window else {**WEIGHTS, "refiner": small_case.seeded_params(modules["refiner"])}
    return Networks.of(modules, weights)


draw = functools.partial(quick_jit, static_argnums=(3, 4))(sample.__wrapped__)


def draw_ids(networks: Networks, labels, numbers, options: SampleOptions = OPTIONS) -> np.ndarray:
    keys = keys_of_samples(0, jnp.asarray(numbers))
    return np.asarray(draw(networks, jnp.asarray(labels), keys, options, ("ids",))[0])


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draw_ids(networks_of(), np.arange(4) % 3, np.arange(4))


@pytest.mark.parametrize(("window", "changes"), [(3, {}), (None, {"conditioning": "full"})])
def test_drawn_ids_are_those_of_teacher_forced_logits_and_the_same_noise(window, changes):
    """Guidance, temperature and filter act on refined logits, and a token's noise is the one that it always has."""
    networks, options = networks_of(window, **changes), OPTIONS
    labels, keys = jnp.arange(2), keys_of_samples(0, jnp.arange(2))
    ids = draw_ids(networks, labels, np.arange(2), options)

    @quick_jit
    def forced(ids):
        cond, uncond = (teacher_forced_logits.__wrapped__(networks, ids, x) for x in (labels, jnp.full(2, 3)))
        found = []
        for scale, (begin, end) in enumerate(zip(MODEL.pyramid.offsets, MODEL.pyramid.offsets[1:], strict=False)):
            t = guidance_strength(options.cfg, scale, 2)
            logits = options.apply(guide(cond[:, begin:end], uncond[:, begin:end], t))
            scale_keys = jax.vmap(functools.partial(jax.random.fold_in, data=scale))(keys)
            found.append(jnp.argmax(logits + gumbel_noise(logits, scale_keys), axis=-1))
        return jnp.concatenate(found, axis=1)

    np.testing.assert_array_equal(forced(ids), ids)


def test_waves_and_raster_draw_the_same_ids(drawn, monkeypatch):
    waves = draw_order.waves
    monkeypatch.setattr(draw_order, "waves", lambda side, window: waves(side, None))
    raster = functools.partial(quick_jit, static_argnums=(3, 4))(lambda *arguments: sample.__wrapped__(*arguments))
    keys = keys_of_samples(0, jnp.arange(4))
    ids = raster(networks_of(), jnp.arange(4) % 3, keys, OPTIONS, ("ids",))[0]
    np.testing.assert_array_equal(ids, drawn)


def test_a_sample_does_not_depend_on_its_batch(drawn):
    order = [3, 1]
    np.testing.assert_array_equal(draw_ids(networks_of(), np.array(order) % 3, order), drawn[order])


def test_scales_that_are_not_refined_are_those_of_the_transformer(drawn):
    labels, numbers = np.arange(4) % 3, np.arange(4)
    base = draw_ids(networks_of().with_refiner(False), labels, numbers)
    last = draw_ids(networks_of().with_refiner(scales=(1,)), labels, numbers)
    assert (last[:, :4] == base[:, :4]).all() and (last[:, 4:] != base[:, 4:]).any()
    assert (base[:, :4] != drawn[:, :4]).any()


def test_smooth_codes_are_mixed_and_drawn_ids_feed_the_refiner(drawn):
    """The first map has the ids of the hard mode: the refiner sees those; mixed codes change the next."""
    keys, options = keys_of_samples(0, jnp.arange(4)), dataclasses.replace(OPTIONS, smooth=True)
    ids, f_hat = draw(networks_of(), jnp.arange(4) % 3, keys, options, ("ids", "f_hat"))
    np.testing.assert_array_equal(ids[:, :4], drawn[:, :4])
    of_ids = quick_jit(lambda ids: TOKENIZER.apply({"params": WEIGHTS["tokenizer"]}, ids, method="f_hats")[-1])(ids)
    assert np.isfinite(f_hat).all() and np.abs(f_hat - of_ids).max() > 0.1


def test_known_tokens_are_seen_by_the_refiner():
    """With all tokens of a map but the last known, the last is drawn from the logits that they give it."""
    networks = networks_of()
    rng = np.random.default_rng(1)
    known = jnp.asarray(rng.integers(0, 16, (2, 20)), jnp.int32)
    mask = jnp.zeros((2, 8, 8)).at[:, 6:, 6:].set(1)
    labels, keys = jnp.arange(2), keys_of_samples(0, jnp.arange(2))
    options = SampleOptions(cfg=0.0, top_k=1)

    @quick_jit
    def run(known):
        logits_fn = guided_logits(networks, labels, 0.0)
        restore = known_tokens(networks, known, mask, jnp.float32(0))
        ids, _, _ = sample_pyramid(logits_fn, networks, keys, options, known=restore)
        return ids, jnp.argmax(teacher_forced_logits.__wrapped__(networks, ids, labels), axis=-1)

    ids, best = run(known)
    np.testing.assert_array_equal(ids[:, :-1], known[:, :-1])
    np.testing.assert_array_equal(ids[:, -1], best[:, -1])


def test_scores_of_classes_are_those_of_the_refined_logits():
    networks, ids = networks_of(), np.random.default_rng(0).integers(0, 16, (2, 20))
    scores, logits = quick_jit(
        lambda ids: (
            score_classes.__wrapped__(networks, ids, jnp.array([2, 0])),
            teacher_forced_logits.__wrapped__(networks, ids, jnp.array([0, 0])),
        )
    )(ids)
    expected = sum_per_scale(token_cross_entropy(logits, jnp.asarray(ids)), MODEL.pyramid.areas)
    np.testing.assert_allclose(scores[:, 1], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n: n.with_refiner(scales=(0, 2)), r"refine_scales must be numbers of 0, 1, rising, got \(0, 2\)"),
        (lambda n: n.with_refiner(False, (1,)), "refine_scales needs a refiner, but refiner is off"),
        (lambda n: n.with_refiner(False).with_refiner(scales=(1,)), "refine_scales needs .* holds none; train one"),
    ],
)
def test_scales_that_no_refiner_refines_are_refused(call, words):
    with pytest.raises(InputError, match=f"^{words}") as caught:
        call(networks_of())
    assert caught.value.field == "refine_scales"
