"""Products of activations with weights; the weights' gradients are summed in float32, over devices too."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mvar_jax.ops.platform import current_platform

PRODUCT = "product"  # the name by which a rematerialisation policy keeps results


def multiply(equation: str, dtype: Any, precision: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return einsum(equation, x, kernel) in `dtype`, with float32 accumulation; the operands have x's dtype.

    The kernel's gradient has the kernel's dtype. Left to autodiff, the gradient of a float32 kernel would be rounded
    to x's dtype before devices add their parts.
    """
    return checkpoint_name(_multiply(equation, dtype, precision, x, kernel), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(equation, dtype, precision, x, kernel):
    return jnp.einsum(equation, x, kernel.astype(x.dtype), precision=precision, preferred_element_type=dtype)


def _forward(equation, dtype, precision, x, kernel):
    y = _multiply(equation, dtype, precision, x, kernel)
    # on a GPU, XLA would multiply twice in a loop over layers: into the stacked results that the backward pass reads,
    # and for the layer itself
    return jax.lax.optimization_barrier(y) if current_platform() == "gpu" else y, (x, kernel)


def _backward(equation, dtype, precision, residuals, dy):
    x, kernel = residuals
    dy, (rows, columns, out) = dy.astype(x.dtype), re.split(",|->", equation)
    dx = jnp.einsum(f"{out},{columns}->{rows}", dy, kernel.astype(x.dtype), precision=precision)
    to_kernel = f"{rows},{out}->{columns}"
    return dx, jnp.einsum(to_kernel, x, dy, precision=precision, preferred_element_type=kernel.dtype)


_multiply.defvjp(_forward, _backward)


def multiply_rows(x: jax.Array, kernel: jax.Array, dtype: Any, precision: Any) -> jax.Array:
    """Return x `[..., D]` times a kernel `[D, ...]`, see `multiply`.

    On GPUs and CPUs as one product of two matrices: if rows or columns had several axes, XLA would copy the operands
    of the gradients to other layouts, and on a CPU multiply those at half the rate. On a TPU the rows keep their
    axes: it fills every N of `[B, N, D]` up to a multiple of 8, so that `[B * N, D]` would be a copy.
    """
    D = x.shape[-1]
    if current_platform() == "tpu":
        rows = "abc"[: x.ndim - 1]
        y = multiply(f"{rows}d,df->{rows}f", dtype, precision, x, kernel.reshape(D, -1))
    else:
        y = multiply("rd,df->rf", dtype, precision, x.reshape(-1, D), kernel.reshape(D, -1))
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x plus a bias of its last axes, in x's dtype; the bias' gradient is summed in the bias' dtype."""
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)
