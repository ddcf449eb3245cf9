"""A convolution whose kernel's gradient is fast on a CPU."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mvar_jax.ops.platform import current_platform

LEAST_KERNEL = 128 * 128  # channels in times channels out from which the gradient is taken as products
BLOCK_PLACES = 1024  # of the output, at least a row of each image: what caches hold of their channels
NUMBERS = ("NHWC", "HWIO", "NHWC")
Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x_BYXC,
    kernel_yxCO,
    strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    *,
    precision=None,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    dimension_numbers=None,
):
    """Return the convolution of maps; it fits `flax.linen.Conv.conv_general_dilated`.

    On a CPU XLA takes the gradient of a kernel as a convolution with a window as large as the map, at an eighth of
    the rate of the convolution itself if maps are 256 x 256. For many channels it is a sum of products over blocks of
    rows here, which takes less memory too if maps are large (benchmarks/RESULTS.md).

    Raises ValueError for dilation and groups. dimension_numbers is flax's: dimensions are those of the names.
    """
    if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise ValueError("convolve has neither dilation nor groups; use jax.lax.conv_general_dilated")
    steps, pads = tuple(strides), tuple(tuple(pair) for pair in padding)
    if current_platform() == "cpu" and kernel_yxCO.shape[2] * kernel_yxCO.shape[3] >= LEAST_KERNEL:
        return _convolve_by_blocks(x_BYXC, kernel_yxCO, steps, pads, precision)
    return _convolve(x_BYXC, kernel_yxCO, steps, pads, precision)


def _convolve(x_BYXC, kernel_yxCO, strides, padding, precision):
    return jax.lax.conv_general_dilated(
        x_BYXC, kernel_yxCO, strides, padding, dimension_numbers=NUMBERS, precision=precision
    )


_convolve_by_blocks = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3, 4))


def _forward(x_BYXC, kernel_yxCO, strides, padding, precision):
    return _convolve(x_BYXC, kernel_yxCO, strides, padding, precision), (x_BYXC, kernel_yxCO)


def _backward(strides, padding, precision, saved, grad_BYXO):
    x_BYXC, kernel_yxCO = saved
    _, vjp = jax.vjp(lambda x: _convolve(x, kernel_yxCO, strides, padding, precision), x_BYXC)
    grad_yxCO = _kernel_gradient(x_BYXC, grad_BYXO, kernel_yxCO.shape[:2], strides, padding, precision)
    return *vjp(grad_BYXO), grad_yxCO.astype(kernel_yxCO.dtype)


_convolve_by_blocks.defvjp(_forward, _backward)


def _kernel_gradient(x_BYXC, grad_BYXO, window, strides: tuple[int, ...], padding: Pads, precision):
    """Return the gradient [y, x, C, O] of a kernel in float32: products of blocks of rows, added up."""
    B, Y, X, O = grad_BYXO.shape
    C, (down, right) = x_BYXC.shape[-1], strides
    rows = max(n for n in range(1, Y + 1) if Y % n == 0 and (n == 1 or B * n * X <= BLOCK_PLACES))
    padded_BYXC = jnp.pad(x_BYXC, ((0, 0), *padding, (0, 0)))
    multiply = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )

    def add_block(number, sum_NCO):
        span = (rows - 1) * down + window[0]
        block_BYXC = jax.lax.dynamic_slice_in_dim(padded_BYXC, number * rows * down, span, 1)
        grad_PO = jax.lax.dynamic_slice_in_dim(grad_BYXO, number * rows, rows, 1).reshape(-1, O)

        def at(y, x):
            taken = block_BYXC[:, y : y + (rows - 1) * down + 1 : down, x : x + (X - 1) * right + 1 : right]
            return multiply(taken.reshape(-1, C), grad_PO)

        return sum_NCO + jnp.stack([at(y, x) for y in range(window[0]) for x in range(window[1])])

    zeros = jnp.zeros((window[0] * window[1], C, O), jnp.float32)
    return jax.lax.fori_loop(0, Y // rows, add_block, zeros).reshape(*window, C, O)
