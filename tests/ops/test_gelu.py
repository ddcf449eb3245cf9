import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.gelu import gelu

X = jnp.concatenate([jnp.linspace(-6, 6, 1001), jnp.asarray([-60.0, 0.0, 60.0])])


def slope(fn, x):
    return jax.vmap(jax.grad(fn))(x)


def test_values_and_slopes_are_those_of_the_tanh_formula():
    plain = lambda x: nn.gelu(x, approximate=True)
    np.testing.assert_array_equal(gelu(X), plain(X))
    np.testing.assert_array_equal(jax.vmap(lambda x: jax.value_and_grad(gelu)(x)[0])(X), plain(X))
    x, c = np.asarray(X, np.float64), np.sqrt(2 / np.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    expected = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    np.testing.assert_allclose(slope(gelu, X), expected, atol=3e-6)


def test_in_bfloat16_training_rounds_once():
    half = X.astype(jnp.bfloat16)
    exact = half.astype(jnp.float32)
    np.testing.assert_array_equal(jax.vjp(gelu, half)[0], gelu(exact).astype(jnp.bfloat16))
    np.testing.assert_array_equal(slope(gelu, half), slope(gelu, exact).astype(jnp.bfloat16))
