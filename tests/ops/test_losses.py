import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvar_jax.ops.losses import commitment_loss, sum_per_scale, token_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 7)) * 3
IDS = RNG.integers(0, 7, (2, 5))
LOG_P = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_its_formula(smoothing):
    nll = -np.take_along_axis(LOG_P, IDS[..., None], -1)[..., 0]
    expected = (1 - smoothing) * nll - smoothing * LOG_P.mean(-1)
    ours = token_cross_entropy(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(IDS), smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_cross_entropy_is_float32_and_finite_for_huge_low_precision_logits():
    logits = jnp.asarray([[[1e4, 0.0, -1e4]]], jnp.bfloat16)
    ours = token_cross_entropy(logits, jnp.asarray([[2]]))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, 2e4, rtol=0.01)


def test_sums_per_scale_cut_at_the_maps():
    x_BN = jnp.arange(28.0).reshape(2, 14)
    np.testing.assert_array_equal(sum_per_scale(x_BN, (1, 4, 9)), [[0, 10, 81], [14, 66, 207]])


def test_commitment_loss_weighs_the_encoder_by_beta_and_the_codes_by_one():
    f, first, second = (jnp.asarray(RNG.normal(size=(2, 3, 3, 4)), jnp.float32) for _ in range(3))
    mse = [np.mean(np.square(np.asarray(x) - np.asarray(f))) for x in (first, second)]
    assert commitment_loss(f, (first, second), 0.25) == pytest.approx(1.25 * np.mean(mse), rel=1e-6)
    f_grad, (first_grad, _) = jax.grad(commitment_loss, argnums=(0, 1))(f, (first, second), 0.25)
    size = f.size * 2
    np.testing.assert_allclose(f_grad, 0.25 * 2 * (2 * f - first - second) / size, atol=1e-7)
    np.testing.assert_allclose(first_grad, 2 * (first - f) / size, atol=1e-7)
