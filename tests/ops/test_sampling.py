import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import assert_close, load

from mvar_jax.ops.sampling import (
    draw,
    filter_logits,
    guidance_strength,
    guide,
    gumbel_noise,
    mix_codes,
    smooth_weights,
)

GOLDEN = load("topk_topp")
PAIRS = [(i, int(k), float(p)) for i, (k, p) in enumerate(GOLDEN["pairs"])]


@pytest.mark.parametrize(("i", "top_k", "top_p"), PAIRS)
def test_filters_equal_golden(i, top_k, top_p):
    ours = filter_logits(jnp.asarray(GOLDEN["logits"]), top_k, top_p)
    np.testing.assert_array_equal(jnp.isneginf(ours), GOLDEN[f"mask{i}"])
    assert_close("probabilities", jax.nn.softmax(ours, -1), GOLDEN[f"probs{i}"], atol=1e-6)


@pytest.mark.parametrize(("i", "top_k", "top_p"), PAIRS)
def test_filters_keep_as_many_and_the_same_values_as_golden_on_ties(i, top_k, top_p):
    logits = GOLDEN["logits_ties"]
    ours = np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p))
    for row in np.ndindex(logits.shape[:2]):
        kept = np.sort(logits[row][np.isfinite(ours[row])])
        np.testing.assert_array_equal(kept, np.sort(logits[row][~GOLDEN[f"mask_ties{i}"][row]]))
    probabilities = np.sort(np.asarray(jax.nn.softmax(jnp.asarray(ours), -1)), -1)
    assert_close("sorted probabilities", probabilities, np.sort(GOLDEN[f"probs_ties{i}"], -1), atol=1e-6)


def test_filters_switched_off_leave_the_logits():
    logits = jnp.asarray(GOLDEN["logits"])
    for top_k, top_p in ((0, 0.0), (64, 0.0), (1000, 0.0)):
        np.testing.assert_array_equal(filter_logits(logits, top_k, top_p), logits)


def test_top_p_never_removes_the_most_likely():
    kept = jnp.isfinite(filter_logits(jnp.asarray(GOLDEN["logits"]), 0, 1e-9))
    np.testing.assert_array_equal(kept, GOLDEN["logits"] == GOLDEN["logits"].max(-1, keepdims=True))


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.75, 3), (0.5, 2), (0.25, 1), (0.6, 3), (1.0, 4)])
def test_top_p_removes_up_to_and_with_the_complement(top_p, num_kept):
    kept = jnp.isfinite(filter_logits(jnp.zeros((2, 4)), 0, top_p))  # cumulative .25, .5, .75, 1, exactly
    np.testing.assert_array_equal(kept.sum(-1), num_kept)


def test_guidance_grows_from_nothing_to_cfg():
    strengths = [guidance_strength(2.7, scale, 10) for scale in range(10)]
    np.testing.assert_allclose(strengths, 2.7 * np.arange(10) / 9, rtol=1e-12)
    assert guidance_strength(2.7, 0, 1) == 0
    cond, uncond = jnp.asarray([[[1.0, 2.0]]]), jnp.asarray([[[3.0, -1.0]]])
    np.testing.assert_allclose(guide(cond, uncond, 0.5), [[[0.0, 3.5]]])


@pytest.mark.parametrize("num_scales", [10, 14])
def test_smooth_codes_average_the_codebook_at_the_published_temperature(num_scales):
    rng = np.random.default_rng(0)
    logits, noise, codebook = rng.normal(size=(2, 3, 16)), rng.gumbel(size=(2, 3, 16)), rng.normal(size=(16, 4))
    logits[..., 3] = -np.inf
    for scale in range(num_scales):
        ratio = scale / (num_scales - 1)
        x = (logits * (1 + ratio) + noise) / max(0.27 * (1 - 0.95 * ratio), 0.005)
        weights = np.exp(x - x.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ codebook
        shares = smooth_weights(*(jnp.asarray(x, jnp.float32) for x in (logits, noise)), scale, num_scales)
        np.testing.assert_allclose(mix_codes(shares, jnp.asarray(codebook, jnp.float32)), expected, atol=2e-3)


def test_smooth_temperatures_equal_golden():
    golden = load("more_smooth_nofilter")
    ratio = np.arange(10) / 9
    np.testing.assert_allclose(np.maximum(0.27 * (1 - 0.95 * ratio), 0.005), golden["tau"], rtol=1e-12)
    np.testing.assert_allclose(1 + ratio, golden["logit_mul"], rtol=1e-12)


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    filtered = jnp.broadcast_to(filter_logits(logits, 3, 0.0), (1, 20000, 4))
    ids = np.asarray(draw(filtered, jax.random.split(jax.random.key(0), 1)))
    share = np.bincount(ids[0], minlength=4) / 20000
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)
    assert share[3] == 0


def test_a_draw_depends_on_its_own_key_alone():
    keys_B = jax.random.split(jax.random.key(1), 5)
    logits = jnp.zeros((5, 50, 8))
    together = draw(logits, keys_B)
    np.testing.assert_array_equal(together[3:4], draw(logits[3:4], keys_B[3:4]))
    assert (together[0] != together[1]).any()


def test_gumbel_noise_has_the_standard_moments():
    noise = gumbel_noise(jnp.zeros((1, 300, 300)), jax.random.split(jax.random.key(2), 1))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)
