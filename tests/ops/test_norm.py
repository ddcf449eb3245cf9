import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit

from mvar_jax.ops.norm import layer_norm, modulated_norm

RNG = np.random.default_rng(0)


def rows(dtype, offset: float, spread: float):
    """Return x `[2, 5, 24]`, a scale and a shift `[2, 1, 24]`, and a cotangent."""
    x = offset + spread * RNG.normal(size=(2, 5, 24))
    scale, shift = RNG.normal(size=(2, 2, 1, 24))
    return jnp.asarray(x, dtype), *(jnp.asarray(y, jnp.float32) for y in (scale, shift, RNG.normal(size=x.shape)))


def in_float64(x, scale, shift, dout):
    """Return the result and the three gradients by the formulas of a normalisation's derivative."""
    x, scale, shift, dout = (np.asarray(y.astype(jnp.float32), np.float64) for y in (x, scale, shift, dout))
    mean = x.mean(-1, keepdims=True)
    rate = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    unit, dunit = (x - mean) * rate, dout * (1 + scale)
    # d rate / d x has the factor 1 / D, as the mean has
    drate = ((x - mean) * dunit).sum(-1, keepdims=True)
    dcentred = rate * dunit - rate**3 * drate * (x - mean) / x.shape[-1]
    dx = dcentred - dcentred.mean(-1, keepdims=True)
    return unit * (1 + scale) + shift, dx, (dout * unit).sum(1, keepdims=True), dout.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("offset", "spread"), [(0, 1), (30, 1), (-5, 100), (0, 1e-3), (0, 0)], ids=lambda number: f"{number:g}"
)
def test_the_modulated_norm_and_its_gradients_are_those_of_float64(offset, spread):
    x, scale, shift, dout = rows(jnp.float32, offset, spread)

    @quick_jit
    def run(*arrays):
        out, pull_back = jax.vjp(modulated_norm, *arrays)
        return out, *pull_back(dout)

    for ours, exact in zip(run(x, scale, shift), in_float64(x, scale, shift, dout), strict=True):
        # of numbers around 30 float32 keeps five digits of the differences
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=2e-5 * max(1, np.abs(exact).max()))


def test_a_bfloat16_input_is_normalised_in_float32_and_its_gradient_is_rounded_once():
    x, scale, shift, dout = rows(jnp.bfloat16, 0, 1)
    out, pull_back = jax.vjp(modulated_norm, x, scale, shift)
    exact_out, exact_pull_back = jax.vjp(modulated_norm, x.astype(jnp.float32), scale, shift)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, exact_out)
    dx, *others = pull_back(dout)
    exact_dx, *exact_others = exact_pull_back(dout)
    np.testing.assert_array_equal(dx, exact_dx.astype(jnp.bfloat16))
    for ours, exact in zip(others, exact_others, strict=True):
        np.testing.assert_array_equal(ours, exact)


def test_without_scale_and_shift_it_is_the_layer_norm():
    x, scale, shift, dout = rows(jnp.float32, 1, 2)
    zeros = jnp.zeros_like(scale)
    out, pull_back = jax.vjp(lambda x: modulated_norm(x, zeros, zeros), x)
    expected, expected_pull_back = jax.vjp(layer_norm, x)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(pull_back(dout)[0], expected_pull_back(dout)[0], rtol=1e-4, atol=1e-5)
