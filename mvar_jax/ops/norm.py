"""Layer norm without weights of its own, and the same with a condition's scale and shift, with its gradient."""

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalise over the last axis without affine parameters, eps 1e-6, in float32."""
    x = x.astype(jnp.float32)
    mean, rate = moments_of(x)
    return (x - mean) * rate


def moments_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (mean, one over the standard deviation) of float32 numbers over the last axis, `[..., 1]`; eps 1e-6."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + 1e-6)


@jax.custom_vjp
def modulated_norm(x_BND: jax.Array, scale_B1D: jax.Array, shift_B1D: jax.Array) -> jax.Array:
    """Return layer_norm(x) * (1 + scale) + shift, `[B, N, D] float32`; scale and shift are float32.

    The gradient is written out. Left to autodiff, XLA writes products of x and the result's gradient to a GPU's
    memory in float32, because it sums them along two axes.
    """
    return layer_norm(x_BND) * (1 + scale_B1D) + shift_B1D


def forward(x_BND, scale_B1D, shift_B1D):
    return modulated_norm(x_BND, scale_B1D, shift_B1D), (x_BND, scale_B1D)


def backward(residuals, dout_BND):
    x_BND, scale_B1D = residuals
    x = x_BND.astype(jnp.float32)
    # the barrier makes both sums read x and these few numbers, instead of a product that the first one leaves
    mean_BN1, rate_BN1 = jax.lax.optimization_barrier(moments_of(x))
    unit = (x - mean_BN1) * rate_BN1
    dscale_B1D = jnp.sum(dout_BND * unit, axis=1, keepdims=True)
    dshift_B1D = jnp.sum(dout_BND, axis=1, keepdims=True)
    # the mean of `unit` is 0, so one mean can follow the other, in one kernel
    dunit = dout_BND * (1 + scale_B1D)
    dunit = dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True)
    dx_BND = (dunit - jnp.mean(dunit, axis=-1, keepdims=True)) * rate_BN1
    return dx_BND.astype(x_BND.dtype), dscale_B1D, dshift_B1D


modulated_norm.defvjp(forward, backward)
