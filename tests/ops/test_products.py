import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.products import add_bias, multiply, multiply_rows

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5, 8)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(8, 3, 2, 4)), jnp.float32)
WEIGHT = jnp.asarray(RNG.normal(size=(3, 5, 3, 2, 4)), jnp.float32)  # of the results in a loss
EINSUM = "bnd,dthk->bnthk"


def rows_of_a_tpu(x, kernel):
    with compiling_for("tpu"):
        return multiply_rows(x, kernel, x.dtype, None)


FORMS = {
    "einsum": lambda x, kernel: multiply(EINSUM, x.dtype, None, x, kernel),
    "rows": lambda x, kernel: multiply_rows(x, kernel, x.dtype, None),
    "rows of a TPU": rows_of_a_tpu,
    "autodiff": lambda x, kernel: jnp.einsum(EINSUM, x, kernel.astype(x.dtype)),
}


def gradients(name: str, dtype):
    """Return (result, gradients of x and kernel) of a weighted sum."""
    loss = lambda x, kernel: jnp.sum(FORMS[name](x, kernel).astype(jnp.float32) * WEIGHT)
    x = X.astype(dtype)
    return FORMS[name](x, KERNEL), *jax.grad(loss, (0, 1))(x, KERNEL)


@pytest.mark.parametrize("name", ["einsum", "rows", "rows of a TPU"])
def test_products_and_their_gradients_are_those_of_einsum(name):
    for ours, theirs in zip(gradients(name, jnp.float32), gradients("autodiff", jnp.float32), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "is_exact"), [("einsum", True), ("rows", True), ("rows of a TPU", True), ("autodiff", False)]
)
def test_a_gradient_of_bfloat16_products_is_summed_in_float32(name, is_exact):
    """Autodiff rounds each device's part to 8 bits, more than 1e-3, before the parts are added."""
    result, dx, dkernel = gradients(name, jnp.bfloat16)
    assert result.dtype == dx.dtype == jnp.bfloat16 and dkernel.dtype == jnp.float32
    low = lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    exact = np.einsum("bnd,bnthk->dthk", low(X), low(WEIGHT))
    error = np.linalg.norm(np.asarray(dkernel) - exact) / np.linalg.norm(exact)
    assert (error < 1e-6) == is_exact and (error < 1e-3) == is_exact


def test_a_bias_is_added_in_the_dtype_of_its_operand_and_its_gradient_is_summed_in_float32():
    x, bias = jnp.ones((1000, 2), jnp.bfloat16), jnp.full((2,), 1 / 3)
    y, pull_back = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(y, x + bias.astype(jnp.bfloat16))
    dy = jnp.asarray(RNG.normal(size=x.shape), jnp.bfloat16)
    dx, dbias = pull_back(dy)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(dbias, np.sum(np.asarray(dy, np.float64), axis=0), rtol=1e-5)


@pytest.mark.parametrize(("platform", "num_copies"), [("tpu", 0), ("gpu", 2)])
def test_rows_keep_their_axes_on_a_tpu(platform, num_copies):
    """A TPU fills every 5 rows of `[3, 5, 8]` up to 8, so that `[15, 8]` is a copy."""
    with compiling_for(platform):
        jaxpr = jax.make_jaxpr(lambda x, kernel: multiply_rows(x, kernel, x.dtype, None))(X, KERNEL[:, 0, 0])
    assert str(jaxpr).count("reshape[") == num_copies
