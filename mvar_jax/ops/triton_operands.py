"""What the Triton kernels of attention read and write: blocks of tokens, and the two forms of queries, keys, values.

A form reads blocks of q, k and v that are ready for products, and writes the gradients of its arrays from theirs.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mvar_jax.ops.attention import unit_norm, unit_norm_gradient
from mvar_jax.ops.products import add_bias

QUERY, KEY, VALUE = range(3)
# rows of the raw form's parameters
QUERY_BIAS, QUERY_SCALE, VALUE_BIAS = range(3)


def columns_of(width: int):
    """Return the slice of a head's columns, padded to a power of two as Triton asks, and their mask.

    The mask is false in the padding.
    """
    padded = max(16, pl.next_power_of_2(width))
    return pl.ds(0, padded), jnp.arange(padded) < width


def number_of(part: int):
    """Return the index of a part as an array: the interpreter does not take Python's integers."""
    return jnp.int32(part)


def rows_of(ref, begin, size: int, part: int | None):
    """Return the slices of rows begin .. begin + size of a reference, and the mask of those in it."""
    rows = begin + jnp.arange(size) < ref.shape[0]
    if len(ref.shape) == 1:
        return (pl.ds(begin, size),), rows
    columns, exists = columns_of(ref.shape[-1])
    place = (pl.ds(begin, size), columns) if part is None else (pl.ds(begin, size), number_of(part), columns)
    return place, rows[:, None] & exists[None]


def load(ref, begin, size: int, part: int | None = None):
    """Return rows begin .. begin + size of a reference `[N, K]`, `[N]` or, of one part, `[N, 3, K]`; zeros beyond."""
    place, exists = rows_of(ref, begin, size, part)
    return plgpu.load(ref.at[place], mask=exists, other=0.0)


def store(ref, begin, value, part: int | None = None):
    """Write rows from `begin` on, in the reference's dtype; rows beyond its end are left out."""
    place, exists = rows_of(ref, begin, value.shape[0], part)
    plgpu.store(ref.at[place], value.astype(ref.dtype), mask=exists)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Three arrays `[B, N, H, K]`, which are multiplied as they are."""

    q: Any
    k: Any
    v: Any

    axes: ClassVar[tuple[str, ...]] = ("bnhk",) * 3
    gradient_axes: ClassVar[tuple[str, ...]] = ("bnhk",) * 3

    @staticmethod
    def gradients_like(inputs, num_blocks: int):
        """Return the shapes of what the backward kernel writes."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]

    @staticmethod
    def sum_gradients(gradients):
        """Return the gradients of the arrays from what the backward kernel wrote."""
        return tuple(gradients)

    def query(self, begin, size: int):
        return load(self.q, begin, size)

    def key(self, begin, size: int):
        return load(self.k, begin, size)

    def value(self, begin, size: int):
        return load(self.v, begin, size)

    def store_query_gradient(self, to, begin, dq):
        store(to[QUERY], begin, dq)

    def store_key_value_gradients(self, to, begin, dk, dv):
        store(to[KEY], begin, dk)
        store(to[VALUE], begin, dv)


@dataclasses.dataclass(frozen=True)
class Raw:
    """The raw product `[B, N, 3, H, K]`, and float32 rows `[3, H, K]`: bias of q, scale of q, bias of v.

    Biases, unit norms and the scale are applied to each block after it is read, and rounded as by `add_bias` and
    `normalise_query_key`. The backward kernel writes the gradient of the product, and of the rows one sum for each
    block of tokens.
    """

    product: Any
    rows: Any

    axes: ClassVar[tuple[str, ...]] = ("bnphk", "phk")
    gradient_axes: ClassVar[tuple[str, ...]] = ("bnphk", "bhipk")

    @staticmethod
    def gradients_like(inputs, num_blocks: int):
        """Return the shapes of what the backward kernel writes."""
        product, (_, H, K) = inputs[0], inputs[1].shape
        sums = jax.ShapeDtypeStruct((product.shape[0], H, num_blocks, 3, K), jnp.float32)
        return [jax.ShapeDtypeStruct(product.shape, product.dtype), sums]

    @staticmethod
    def sum_gradients(gradients):
        """Return the gradients of the arrays from what the backward kernel wrote."""
        product, sums_BHiPK = gradients
        return product, jnp.sum(sums_BHiPK, axis=(0, 2)).swapaxes(0, 1)

    def row(self, number: int):
        """Return one row of the parameters, `[K]`, padded with zeros."""
        columns, exists = columns_of(self.rows.shape[-1])
        return plgpu.load(self.rows.at[number_of(number), columns], mask=exists, other=0.0)

    def query(self, begin, size: int):
        q = load(self.product, begin, size, QUERY)
        return (unit_norm(add_bias(q, self.row(QUERY_BIAS))) * self.row(QUERY_SCALE)).astype(q.dtype)

    def key(self, begin, size: int):
        k = load(self.product, begin, size, KEY)
        return unit_norm(k).astype(k.dtype)

    def value(self, begin, size: int):
        return add_bias(load(self.product, begin, size, VALUE), self.row(VALUE_BIAS))

    def store_query_gradient(self, to, begin, dq):
        dproduct, drows = to
        # read again: kept from before the loop, the block would take registers in it
        biased = add_bias(load(self.product, begin, dq.shape[0], QUERY), self.row(QUERY_BIAS))
        # a row beyond the last token is a query of the bias alone
        exists = begin + jnp.arange(dq.shape[0]) < self.product.shape[0]
        dq = jnp.where(exists[:, None], dq, 0.0)
        store_row(drows, QUERY_SCALE, jnp.sum(dq * unit_norm(biased), axis=0))
        dq = unit_norm_gradient(biased, dq * self.row(QUERY_SCALE))
        store(dproduct, begin, dq, QUERY)
        store_row(drows, QUERY_BIAS, jnp.sum(dq, axis=0))

    def store_key_value_gradients(self, to, begin, dk, dv):
        dproduct, drows = to
        # values first: their registers are free for the keys
        store(dproduct, begin, dv, VALUE)
        store_row(drows, VALUE_BIAS, jnp.sum(dv, axis=0))
        store(dproduct, begin, unit_norm_gradient(load(self.product, begin, dk.shape[0], KEY), dk), KEY)


def store_row(ref, number: int, value):
    columns, exists = columns_of(ref.shape[-1])
    plgpu.store(ref.at[number_of(number), columns], value, mask=exists)
