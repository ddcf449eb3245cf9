import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import quick_jit

from mvar_jax.errors import InputError
from mvar_jax.models.draw_order import neighbors, visible_mask, waves
from mvar_jax.models.networks import Networks
from mvar_jax.models.refined import phase_logits
from mvar_jax.models.refiner import Refiner, check_base, start_weights

SIDES = (1, 2, 4)
MODEL = small_case.MODEL.clone(sides=SIDES, depth=1)
TOKENIZER = small_case.TOKENIZER.clone(sides=SIDES)
REFINER = Refiner(SIDES, vocab_size=16, code_width=4, width=16, num_heads=2)


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_each_place_is_drawn_once_and_after_all_that_it_sees(side, window):
    order = waves(side, window)
    step_of = {int(place): step for step, row in enumerate(order) for place in row if place < side * side}
    assert sorted(step_of) == list(range(side * side)) and (order < side * side).sum() == side * side
    mask = visible_mask(side, window)
    assert mask.diagonal().all() and not np.triu(mask, 1).any()
    assert all(step_of[seen] < step_of[place] for place, seen in zip(*np.nonzero(mask), strict=True) if place != seen)
    for place, near in enumerate(neighbors(side, window)[:-1]):
        assert all(mask[place, other] and other != place for other in near if other < side * side)


def test_a_window_takes_few_waves_and_none_takes_one_for_each_token():
    """(r + 1) (w - 1) + w waves for a map of side w, as long as the window does not cover it."""
    assert [len(waves(side, 3)) for side in (1, 2, 16)] == [1, 4, 46]
    assert len(waves(16, 5)) == 61 and len(waves(16, None)) == 256
    # for all maps of an image of 256 x 256 pixels
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert [sum(len(waves(side, window)) for side in sides) for window in (None, 3)] == [680, 184]


@pytest.mark.parametrize(("conditioning", "window", "scales"), [("markov", 3, (0, 2)), ("full", None, ())])
def test_fresh_parameters_give_the_logits_of_the_transformer(conditioning, window, scales):
    """Whatever the ids: an input, a branch or a head that starts otherwise changes the logits."""
    model, refiner = MODEL.clone(conditioning=conditioning), REFINER.clone(window=window, scales=scales)
    params, tokenizer_params = small_case.seeded_params(model), small_case.seeded_params(TOKENIZER)
    batch = small_case.seeded_batch(model)

    @quick_jit
    def run():
        fresh = nn.meta.unbox(refiner.init_params(jax.random.key(0, impl="rbg")))
        base = Networks(TOKENIZER, tokenizer_params, model, params)
        own = start_weights(params, tokenizer_params["codebook"])
        refined = base.replace(refiner=refiner, refiner_params=fresh | own)
        phases, given = model.phases(), (batch["previous"], batch["ids"], batch["label"])
        all_logits = lambda networks: [phase_logits(networks, *given, phase) for phase in phases]
        return (
            all_logits(base),
            all_logits(refined),
            tokenizer_params["codebook"] @ own["embed"]["kernel"] + own["embed"]["bias"],
        )

    base, refined, codes = run()
    assert all(np.abs(x).max() > 0.5 for x in base)
    for one, other in zip(base, refined, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.std(codes) == pytest.approx(1, abs=1e-5)


def test_logits_depend_on_the_drawn_tokens_that_a_token_sees_and_on_no_others():
    """Changing one id changes the logits of the places that reach it through the blocks, all of them later."""
    refiner = REFINER.clone(depth=1, scales=(2,))
    params = small_case.seeded_params(refiner)
    rng = np.random.default_rng(0)
    hidden, codebook = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 16, 16), (16, 4)))
    ids = np.tile(rng.integers(0, 15, 16), (17, 1))
    ids[np.arange(16), np.arange(16)] += 1  # row i differs from the last row at place i

    run = quick_jit(
        lambda ids: refiner.apply(
            {"params": params}, jnp.repeat(hidden, 17, 0), ids, codebook, (2,), method="teacher_forced"
        )
    )
    logits = np.asarray(run(ids))
    differs = np.abs(logits[:-1] - logits[-1]).max(-1) > 1e-5  # [changed place, place]
    near = visible_mask(4, 3) & ~np.eye(16, dtype=bool)  # [place, neighbor]
    reach = (visible_mask(4, 3).astype(int) @ near.astype(int)) > 0  # a token sees tokens, whose input is neighbors
    np.testing.assert_array_equal(differs, reach.T)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 4}, "window must be an odd window side of 1 or more, got 4"),
        ({"window": 1}, "window must be from 3 to 9, or None for all earlier tokens, got 1"),
        ({"window": 1000001}, "window must be from 3 to 9, or None for all earlier tokens, got 1000001"),
        ({"scales": (1, 7)}, r"scales must be numbers of 0, 1, 2, rising, got \(1, 7\)"),
        ({"scales": (2, 1)}, r"scales must be numbers of 0, 1, 2, rising, got \(2, 1\)"),
        ({"num_heads": 3}, "num_heads must be a divisor of width=16, got 3"),
    ],
)
def test_a_refiner_that_cannot_be_is_refused(change, words):
    REFINER.check()
    with pytest.raises(InputError, match=f"^{words}$") as caught:
        REFINER.clone(**change).check()
    assert caught.value.field == next(iter(change))


def test_a_refiner_of_another_width_is_refused():
    check_base(REFINER, MODEL)
    with pytest.raises(InputError, match="^width must be 16 as in the transformer, got 32"):
        check_base(REFINER.clone(width=32), MODEL)
