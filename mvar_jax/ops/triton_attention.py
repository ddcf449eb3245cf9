"""Attention by Triton kernels, one forward and one backward, for any rule that says which keys a query sees.

A program owns `block_q` consecutive queries and loops over the range of keys that they see, with a running softmax;
the mask is computed in registers, so there is no array of queries times keys. The forward pass saves the log-sum-exp
of each query, from which the backward pass recomputes the weights. There, a program owns its tokens twice: first as
queries, then as keys. Queries, keys and values come prepared, or from a raw product (ops/triton_operands.py).
"""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mvar_jax.ops.attention import MASKED
from mvar_jax.ops.per_device import per_device
from mvar_jax.ops.platform import current_generation
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.products import PRODUCT
from mvar_jax.ops.triton_operands import Prepared, Raw, load, store
from mvar_jax.ops.triton_shapes import block_shapes

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_WIDTH = 128
LOG2_E = math.log2(math.e)


class Rule(Protocol):
    """Which keys a query sees; hashable, since a kernel is compiled for each rule."""

    @property
    def num_tokens(self) -> int: ...

    def is_seen(self, query_Q, key_K):
        """Return `[queries, keys] bool`: true if the key exists and the query sees it."""

    def keys_of(self, begin, end):
        """Return (first, last + 1) of the keys that queries begin .. end - 1 see."""

    def queries_of(self, begin, end):
        """Return (first, last + 1) of the queries that see keys begin .. end - 1."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A rule, the form of the operands and the shape of a program; one compiled kernel for each value."""

    rule: Any  # a Rule
    form: Any  # Prepared or Raw
    scale: float
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 2
    interpret: bool = False

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.rule.num_tokens, self.block_q)

    def pallas_call(self, body, inputs, outputs, in_axes: tuple[str, ...], out_axes: tuple[str, ...]):
        """Run `body` for each block of tokens, sample and head.

        in_axes, out_axes: b for samples, h for heads and i for blocks, which a program sees its own of; any other
        letter for an axis that it sees whole.
        """
        B, H = (inputs[0].shape[in_axes[0].index(axis)] for axis in "bh")

        def own(x, axes: str):
            sizes = [None if axis in "bhi" else size for axis, size in zip(axes, x.shape, strict=True)]
            return pl.BlockSpec(tuple(sizes), lambda i, b, h: tuple({"b": b, "h": h, "i": i}.get(a, 0) for a in axes))

        return pl.pallas_call(
            functools.partial(body, self),
            grid=(self.num_blocks, B, H),
            in_specs=list(map(own, inputs, in_axes)),
            out_specs=list(map(own, outputs, out_axes)),
            out_shape=outputs,
            compiler_params=plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages),
            interpret=self.interpret,
            name=body.__name__,
        )(*inputs)


def dot(a, b, trans_a: bool = False, trans_b: bool = False):
    """Multiply with float32 accumulation; float32 operands are not rounded to TF32."""
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision_of("attention", a.dtype))


def attention_forward(kernel: Kernel, *refs):
    """Write the output and log2-sum-exp2 of one block of queries. refs: a form's operands, output, log2-sum-exp2."""
    *inputs, out_ref, lse_ref = refs
    operands = kernel.form(*inputs)
    begin = pl.program_id(0) * kernel.block_q
    end = jnp.minimum(begin + kernel.block_q, kernel.rule.num_tokens)
    q = operands.query(begin, kernel.block_q)
    query = jnp.minimum(begin + jnp.arange(kernel.block_q), kernel.rule.num_tokens - 1)
    first, last = kernel.rule.keys_of(begin, end)

    def visit(i, carry):
        out, top, total = carry
        at = first + i * kernel.block_k
        k, v = operands.key(at, kernel.block_k), operands.value(at, kernel.block_k)
        logits = dot(q, k, trans_b=True) * (kernel.scale * LOG2_E)
        logits = jnp.where(kernel.rule.is_seen(query, at + jnp.arange(kernel.block_k)), logits, MASKED)
        new_top = jnp.maximum(top, logits.max(-1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - new_top[:, None])
        out = out * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return out, new_top, total * shrink + weights.sum(-1)

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((kernel.block_q,), MASKED, jnp.float32),
        jnp.zeros((kernel.block_q,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, pl.cdiv(last - first, kernel.block_k), visit, start)
    store(out_ref, begin, out / total[:, None])
    store(lse_ref, begin, top + jnp.log2(total))


def attention_backward(kernel: Kernel, *refs):
    """Write the gradients of one block of tokens.

    refs: a form's operands; the output's gradient, log2-sum-exp2 and delta (sum of out * dout) of each query; the
    form's gradients.
    """
    num_inputs = len(kernel.form.axes)
    operands, of_queries = kernel.form(*refs[:num_inputs]), refs[num_inputs : num_inputs + 3]
    gradients = refs[num_inputs + 3 :]
    begin = pl.program_id(0) * kernel.block_q
    end = jnp.minimum(begin + kernel.block_q, kernel.rule.num_tokens)
    operands.store_query_gradient(gradients, begin, query_gradient(kernel, operands, of_queries, begin, end))
    operands.store_key_value_gradients(
        gradients, begin, *key_value_gradients(kernel, operands, of_queries, begin, end)
    )


def query_gradient(kernel: Kernel, operands, of_queries, begin, end):
    """Return the gradient of one block of queries, float32."""
    q = operands.query(begin, kernel.block_q)
    dout, lse, delta = (load(ref, begin, kernel.block_q) for ref in of_queries)
    query = jnp.minimum(begin + jnp.arange(kernel.block_q), kernel.rule.num_tokens - 1)
    first, last = kernel.rule.keys_of(begin, end)

    def visit(i, dq):
        at = first + i * kernel.block_k
        k, v = operands.key(at, kernel.block_k), operands.value(at, kernel.block_k)
        logits = dot(q, k, trans_b=True) * (kernel.scale * LOG2_E)
        seen = kernel.rule.is_seen(query, at + jnp.arange(kernel.block_k))
        weights = jnp.where(seen, jnp.exp2(logits - lse[:, None]), 0.0)
        dlogits = weights * (dot(dout, v, trans_b=True) - delta[:, None]) * kernel.scale
        return dq + dot(dlogits.astype(k.dtype), k)

    zeros = jnp.zeros(q.shape, jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(last - first, kernel.block_k), visit, zeros)


def key_value_gradients(kernel: Kernel, operands, of_queries, begin, end):
    """Return the gradients of one block of `block_q` keys and values, float32; reads `block_k` queries at a time."""
    k, v = operands.key(begin, kernel.block_q), operands.value(begin, kernel.block_q)
    key = begin + jnp.arange(kernel.block_q)
    first, last = kernel.rule.queries_of(begin, end)

    def visit(i, carry):
        dk, dv = carry
        at = first + i * kernel.block_k
        q = operands.query(at, kernel.block_k)
        dout, lse, delta = (load(ref, at, kernel.block_k) for ref in of_queries)
        query = at + jnp.arange(kernel.block_k)
        seen = kernel.rule.is_seen(query, key) & (query < kernel.rule.num_tokens)[:, None]
        logits = dot(q, k, trans_b=True) * (kernel.scale * LOG2_E)
        weights = jnp.where(seen, jnp.exp2(logits - lse[:, None]), 0.0)
        dv = dv + dot(weights.astype(dout.dtype), dout, trans_a=True)
        dlogits = weights * (dot(dout, v, trans_b=True) - delta[:, None]) * kernel.scale
        return dk + dot(dlogits.astype(q.dtype), q, trans_a=True), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(last - first, kernel.block_k), visit, (zeros, zeros))


FORWARD_AXES = ("bnhk", "bhn")  # output, log2-sum-exp2
OF_QUERIES_AXES = ("bnhk", "bhn", "bhn")  # gradient of the output, log2-sum-exp2, delta


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The forward and the backward kernel of one rule and form; they differ in the shape of a program."""

    forward: Kernel
    backward: Kernel


def kernels_for(rule: Rule, form, scale: float, dtype, head_width: int, interpret: bool) -> Kernels:
    """Return the kernels with the shapes of programs for the GPU that they are traced for."""
    shapes = block_shapes(form, dtype, head_width, current_generation())
    return Kernels(*(Kernel(rule, form, scale, *shape, interpret=interpret) for shape in shapes))


@functools.cache
def operations(kernels: Kernels):
    """Return the forward and backward functions of two kernels, with vmap and sharding rules."""
    form = kernels.forward.form

    def forward(*inputs):
        B, N, H, K = (inputs[0].shape[form.axes[0].index(axis)] for axis in "bnhk")
        outputs = [jax.ShapeDtypeStruct((B, N, H, K), inputs[0].dtype), jax.ShapeDtypeStruct((B, H, N), jnp.float32)]
        return tuple(kernels.forward.pallas_call(attention_forward, inputs, outputs, form.axes, FORWARD_AXES))

    def backward(*inputs):
        outputs = form.gradients_like(inputs[: len(form.axes)], kernels.backward.num_blocks)
        in_axes = form.axes + OF_QUERIES_AXES
        return tuple(kernels.backward.pallas_call(attention_backward, inputs, outputs, in_axes, form.gradient_axes))

    return (
        per_device(forward, form.axes, FORWARD_AXES),
        per_device(backward, form.axes + OF_QUERIES_AXES, form.gradient_axes),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_flat(kernels: Kernels, *operands):
    return operations(kernels)[0](*operands)[0]


def attend_flat_forward(kernels, *operands):
    # kept by rematerialisation: the backward pass would otherwise run the forward kernel again
    out, lse = (checkpoint_name(x, PRODUCT) for x in operations(kernels)[0](*operands))
    return out, (operands, out, lse)


def attend_flat_backward(kernels, residuals, dout):
    operands, out, lse = residuals
    delta = jnp.einsum("bnhk,bnhk->bhn", out, dout, preferred_element_type=jnp.float32)
    return kernels.forward.form.sum_gradients(operations(kernels)[1](*operands, dout, lse, delta))


attend_flat.defvjp(attend_flat_forward, attend_flat_backward)


def why_not(dtype, head_width: int) -> str | None:
    """Return the reason that the kernels do not support these heads, or None if they do."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    if head_width > MAX_HEAD_WIDTH:
        return f"head width {head_width} is above {MAX_HEAD_WIDTH}"
    return None


def attend(rule: Rule, q_BNHK, k_BNHK, v_BNHK, scale: float, interpret: bool = False) -> jax.Array:
    """Attend by a rule on a CUDA GPU; `interpret` runs it on any platform, slowly."""
    kernels = kernels_for(rule, Prepared, float(scale), q_BNHK.dtype, q_BNHK.shape[-1], interpret)
    return attend_flat(kernels, q_BNHK, k_BNHK, v_BNHK)


def attend_raw(rule: Rule, qkv_BNPHK, q_bias_HK, v_bias_HK, scale_H, interpret: bool = False) -> jax.Array:
    """Attend with the raw product of queries, keys and values, as `attend` does with prepared ones and scale 1.

    The kernels add the biases, L2-normalise q and k per head, scale q by scale_H, and write the product's gradient.
    One small array holds all parameters, so that they take one launch of a layer.
    """
    scale_HK = jnp.broadcast_to(scale_H[:, None], q_bias_HK.shape)
    rows_PHK = jnp.stack([x.astype(jnp.float32) for x in (q_bias_HK, scale_HK, v_bias_HK)])
    kernels = kernels_for(rule, Raw, 1.0, qkv_BNPHK.dtype, qkv_BNPHK.shape[-1], interpret)
    return attend_flat(kernels, qkv_BNPHK, rows_PHK)
