import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import quick_jit

from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import Refiner, start_weights
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.editing import check_border, drawn_share, redraw, shrink_onto_canvas
from mvar_jax.sampling.sampler import SampleOptions

SIDES = (1, 2, 3)
SIDE = 6
MODEL = small_case.MODEL.clone(sides=SIDES)
TOKENIZER = small_case.TOKENIZER.clone(sides=SIDES)
PARAMS = small_case.seeded_params(MODEL)
TOKENIZER_PARAMS = small_case.seeded_params(TOKENIZER, std=1.0)
LEFT = np.zeros((1, SIDE, SIDE), bool)
LEFT[..., :2] = True  # a third: none of scale 0, half of scale 1's left column, all of scale 2's


def test_share_of_tokens_follows_the_mask_at_each_scale():
    hard = [np.asarray(drawn_share(jnp.asarray(LEFT, jnp.float32), side, 0.0))[0] for side in SIDES]
    assert hard[0].tolist() == [0] and hard[2].reshape(3, 3).tolist() == [[1, 0, 0]] * 3
    assert hard[1].reshape(2, 2).tolist() == [[1, 0]] * 2  # two thirds
    soft = [np.asarray(drawn_share(jnp.asarray(LEFT, jnp.float32), side, 1.0))[0] for side in SIDES]
    for share, masked in zip(soft, ([1 / 3], [2 / 3, 0] * 2, [1, 0, 0] * 3), strict=True):
        np.testing.assert_allclose(share, masked, atol=1e-6)


@pytest.fixture(scope="module")
def run_redraw():
    """(softness, seed) -> (known ids, ids, f_hat, f_hat of the ids) of two samples, one program a softness."""
    known = jnp.asarray(np.random.default_rng(1).integers(0, 16, (2, MODEL.pyramid.num_tokens)), jnp.int32)
    mask = jnp.asarray(LEFT.repeat(2, 0), jnp.float32)
    options = SampleOptions(cfg=1.5, top_k=12)

    @quick_jit
    def draw(keys):
        drawn = {}
        for softness in (0.0, 1.0):
            networks = Networks(TOKENIZER, TOKENIZER_PARAMS, MODEL, PARAMS)
            ids, f_hat = redraw.__wrapped__(networks, known, mask, jnp.array([0, 2]), keys, options, softness)
            drawn[softness] = ids, f_hat, TOKENIZER.apply({"params": TOKENIZER_PARAMS}, ids, method="f_hats")[-1]
        return drawn

    drawn = {seed: draw(keys_of_samples(seed, np.arange(2))) for seed in (0, 1)}
    return lambda softness, seed: (np.asarray(known), *map(np.asarray, drawn[seed][softness]))


@pytest.mark.parametrize("softness", [0.0, 1.0])
def test_known_tokens_are_put_back_at_each_scale(run_redraw, softness):
    is_known = np.array([1, 0, 1, 0, 1, *[0, 1, 1] * 3], bool)
    drawn = []
    for seed in (0, 1):
        known, ids, _, _ = run_redraw(softness, seed)
        np.testing.assert_array_equal(ids[:, is_known], known[:, is_known])
        drawn.append(ids[:, ~is_known])
    assert (drawn[0] != drawn[1]).any(axis=1).all() and (drawn[0] != known[:, ~is_known]).any(axis=1).all()


def test_a_hard_border_keeps_the_codes_of_its_ids_and_a_soft_one_mixes_them(run_redraw):
    _, _, f_hat, of_ids = run_redraw(0.0, 0)
    np.testing.assert_allclose(f_hat, of_ids, atol=1e-4)
    _, _, f_hat, of_ids = run_redraw(1.0, 0)
    assert np.abs(f_hat - of_ids).max() > 0.1


def test_a_fresh_refiner_edits_like_its_transformer(run_redraw):
    """Soft borders too: the codes that are mixed are those of the drawn ids, not of the ids that are put back."""
    refiner = Refiner(SIDES, vocab_size=16, code_width=4, width=16, num_heads=2)
    fresh = nn.meta.unbox(refiner.init_params(jax.random.key(0, impl="rbg")))
    own = start_weights(PARAMS, np.asarray(TOKENIZER_PARAMS["codebook"]))
    networks = Networks(TOKENIZER, TOKENIZER_PARAMS, MODEL, PARAMS, refiner, fresh | own)
    known, ids, f_hat, _ = run_redraw(1.0, 0)
    mask, options = jnp.asarray(LEFT.repeat(2, 0), jnp.float32), SampleOptions(cfg=1.5, top_k=12)

    @quick_jit
    def draw(keys):
        return redraw.__wrapped__(networks, jnp.asarray(known), mask, jnp.array([0, 2]), keys, options, 1.0)

    refined_ids, refined_f_hat = draw(keys_of_samples(0, np.arange(2)))
    np.testing.assert_array_equal(refined_ids, ids)
    np.testing.assert_allclose(refined_f_hat, f_hat, atol=1e-4)


def test_out_painting_draws_around_the_shrunk_image():
    image = np.full((8, 8, 3), 200, np.uint8)
    canvas, mask = shrink_onto_canvas(image, 2.0)
    assert (~mask).sum() == 16 and not mask[2:6, 2:6].any()
    assert (canvas[~mask] == 200).all() and (canvas[mask] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_border(-1, 0.5, SIDE), "border"),
        (lambda: check_border(None, 1.5, SIDE), "softness"),
        (lambda: shrink_onto_canvas(np.zeros((8, 8, 3), np.uint8), 1.0), "expand"),
        (lambda: shrink_onto_canvas(np.zeros((8, 8, 3), np.uint8), 1.0001), "expand must leave room"),
    ],
)
def test_borders_that_cannot_be_meant_are_refused(call, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        call()
    assert caught.value.field == message.split()[0]
