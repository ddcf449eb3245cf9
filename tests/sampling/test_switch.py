"""Two models that share a tokenizer: the first draws the coarse scales, the other the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import quick_jit

from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import Refiner
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.ops.quantize import next_input
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.ops.sampling import draw, guidance_strength, guide
from mvar_jax.sampling.analysis import mix_classes, score_classes, teacher_forced_logits
from mvar_jax.sampling.sampler import SampleOptions, sample

SIDES = (1, 2, 3)
TOKENIZER = small_case.TOKENIZER.clone(sides=SIDES)
LARGE = small_case.MODEL.clone(sides=SIDES)
SMALL = LARGE.clone(depth=1, width=24, num_heads=3)
REFINER = Refiner(SIDES, vocab_size=16, code_width=4, width=24, num_heads=3, depth=1)
TOKENIZER_PARAMS = small_case.seeded_params(TOKENIZER, std=1.0)
FIRST = Networks(TOKENIZER, TOKENIZER_PARAMS, LARGE, small_case.seeded_params(LARGE))
LATER = Networks(TOKENIZER, TOKENIZER_PARAMS, SMALL, small_case.seeded_params(SMALL, seed=1))
REFINED = LATER.replace(refiner=REFINER, refiner_params=small_case.seeded_params(REFINER))
OPTIONS = SampleOptions(cfg=3.0, top_k=12, temperature=(1.5, 1.0, 1.2))
LABELS, NUMBERS = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 2, 40, 1])
BEGIN = LARGE.pyramid.offsets

draw_quickly = functools.partial(quick_jit, static_argnums=(3, 4))(sample.__wrapped__)


def draw_ids(networks: Networks, rows=slice(None), options: SampleOptions = OPTIONS) -> np.ndarray:
    keys = keys_of_samples(7, jnp.asarray(NUMBERS[rows]))
    return np.asarray(draw_quickly(networks, jnp.asarray(LABELS[rows]), keys, options, ("ids",))[0])


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return draw_ids(FIRST)


@pytest.fixture(scope="module")
def later() -> np.ndarray:
    return draw_ids(LATER)


@pytest.fixture(scope="module")
def switched() -> np.ndarray:
    return draw_ids(FIRST.switched(LATER, 2))


def test_a_switch_at_the_end_is_the_first_model_and_at_the_start_the_other(first, later):
    np.testing.assert_array_equal(draw_ids(FIRST.switched(LATER, 3)), first)
    np.testing.assert_array_equal(draw_ids(FIRST.switched(LATER, 0)), later)
    assert (first != later).any()


def test_coarse_scales_are_the_first_models_and_the_rest_follows_from_f_hat(first, switched):
    """The ids of the last scale equal those of a loop that gives the other model nothing but f_hat."""
    np.testing.assert_array_equal(switched[:, : BEGIN[2]], first[:, : BEGIN[2]])

    @quick_jit
    def finish(ids, labels, keys):
        f_hat = TOKENIZER.apply({"params": TOKENIZER_PARAMS}, ids, method="f_hats")[1]
        previous, phase = next_input(f_hat, 1, SIDES), SMALL.pyramid.scale_phase(2)
        apply = lambda labels: SMALL.apply({"params": LATER.params}, previous, labels, phase)[0]
        logits = guide(apply(labels), apply(jnp.full_like(labels, 3)), guidance_strength(OPTIONS.cfg, 2, 3))
        scale_keys = jax.vmap(functools.partial(jax.random.fold_in, data=2))(keys)
        return draw(OPTIONS.at(2, 3).apply(logits), scale_keys)

    keys = keys_of_samples(7, jnp.asarray(NUMBERS))
    np.testing.assert_array_equal(finish(switched, jnp.asarray(LABELS), keys), switched[:, BEGIN[2] :])
    assert (switched[:, BEGIN[2] :] != first[:, BEGIN[2] :]).any()


def test_a_number_of_jax_switches_as_one_of_python(switched):
    networks = FIRST.switched(LATER, jnp.int32(2))
    assert type(networks.switch) is int
    np.testing.assert_array_equal(draw_ids(networks), switched)


def test_a_switched_sample_is_a_function_of_its_label_seed_and_number(switched):
    np.testing.assert_array_equal(draw_ids(FIRST.switched(LATER, 2), slice(None, None, -1)), switched[::-1])
    np.testing.assert_array_equal(switched[4], switched[1])
    assert len(np.unique(switched, axis=0)) == 4


def test_a_refiner_refines_the_scales_of_its_own_model(later, switched):
    """Refined scales before the switch are the first model's; the refiner can be kept to a scale or be off."""
    both = FIRST.switched(REFINED, 2)
    ids = draw_ids(both)
    np.testing.assert_array_equal(ids[:, : BEGIN[2]], switched[:, : BEGIN[2]])
    assert (ids[:, BEGIN[2] :] != switched[:, BEGIN[2] :]).any()
    assert both.with_refiner(False) == FIRST.switched(LATER, 2)
    assert both.with_refiner(scales=(2,)).later.refiner.refined == (2,)
    with pytest.raises(InputError, match="^refine_scales needs a refiner, but the checkpoint holds none"):
        both.with_refiner(scales=(0, 2))


def test_var_may_come_first_and_not_later(later):
    var = dataclasses.replace(FIRST, transformer=LARGE.clone(conditioning="full"))
    ids = draw_ids(var.switched(LATER, 1))
    assert ids.shape == later.shape and (ids[:, 1:] != later[:, 1:]).any()
    with pytest.raises(InputError, match="^switch must be to an MVAR model: VAR needs keys and values of"):
        LATER.switched(var, 1)


def test_logits_and_scores_are_each_scales_own():
    ids, both = np.random.default_rng(0).integers(0, 16, (2, BEGIN[-1])), FIRST.switched(LATER, 2)

    @quick_jit
    def run(ids):
        logits = [teacher_forced_logits(x, ids, jnp.array([1, 1])) for x in (both, FIRST, LATER)]
        return logits, score_classes(both, ids, jnp.array([0, 1]))[:, 1]

    (whole, of_first, of_later), scores = run(jnp.asarray(ids))
    np.testing.assert_allclose(whole[:, : BEGIN[2]], of_first[:, : BEGIN[2]], atol=1e-5)
    np.testing.assert_allclose(whole[:, BEGIN[2] :], of_later[:, BEGIN[2] :], atol=1e-5)
    nll = token_cross_entropy(whole, jnp.asarray(ids))
    np.testing.assert_allclose(scores, sum_per_scale(nll, LARGE.pyramid.areas), rtol=1e-4)


def test_mixed_classes_are_mixed_in_both_models():
    mixing = np.array([[0, 1, 0], [0.5, 0.5, 0]], np.float32)
    mixed = mix_classes(FIRST.switched(LATER, 2), mixing)
    for found, alone in ((mixed, FIRST), (mixed.later, LATER)):
        assert found.transformer.num_classes == 2
        np.testing.assert_array_equal(found.params["class_embed"], mix_classes(alone, mixing).params["class_embed"])


@pytest.mark.parametrize("scale", [-1, 4, 1.5])
def test_a_scale_that_does_not_exist_is_refused(scale):
    words = f"^switch must be .*a number of scales from 0 to 3, got {scale}"
    with pytest.raises(InputError, match=words) as caught:
        FIRST.switched(LATER, scale)
    assert caught.value.field == "switch"
