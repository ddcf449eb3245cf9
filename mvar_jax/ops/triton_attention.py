"""Attention by Triton kernels, one forward and two backward, for any rule that says which keys a query sees.

A program owns `block_q` consecutive queries and loops over the range of keys that they see, with a running softmax;
the mask is computed in registers, so there is no array of queries times keys. The forward pass saves the log-sum-exp
of each query, from which the backward pass recomputes the weights.
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
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.products import PRODUCT

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
    """A rule and the shape of a program; one compiled kernel for each value."""

    rule: Any  # a Rule
    scale: float
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 2
    interpret: bool = False

    def pallas_call(self, body, block: int, inputs, outputs):
        """Run `body` for each block of tokens, sample and head; arrays are `[B, N, H, K]` or `[B, H, N]`."""
        B, N, H, _ = inputs[0].shape

        def whole(x):
            if x.ndim == 4:
                return pl.BlockSpec((None, N, None, x.shape[3]), lambda i, b, h: (b, 0, h, 0))
            return pl.BlockSpec((None, None, N), lambda i, b, h: (b, h, 0))

        return pl.pallas_call(
            functools.partial(body, self),
            grid=(pl.cdiv(N, block), B, H),
            in_specs=[whole(x) for x in inputs],
            out_specs=[whole(x) for x in outputs],
            out_shape=outputs,
            compiler_params=plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages),
            interpret=self.interpret,
            name=body.__name__,
        )(*inputs)


def rows_of(ref, begin, size: int):
    """Return the slices of rows begin .. begin + size of a `[N, K]` or `[N]` reference, and the mask of those in it.

    Triton's vectors have power-of-two sizes, so a head width is padded with zeros.
    """
    rows = begin + jnp.arange(size) < ref.shape[0]
    if len(ref.shape) == 1:
        return (pl.ds(begin, size),), rows
    padded = max(16, pl.next_power_of_2(ref.shape[1]))
    return (pl.ds(begin, size), pl.ds(0, padded)), rows[:, None] & (jnp.arange(padded) < ref.shape[1])[None]


def load(ref, begin, size: int):
    place, exists = rows_of(ref, begin, size)
    return plgpu.load(ref.at[place], mask=exists, other=0.0)


def store(ref, begin, value):
    place, exists = rows_of(ref, begin, value.shape[0])
    plgpu.store(ref.at[place], value.astype(ref.dtype), mask=exists)


def dot(a, b, trans_a: bool = False, trans_b: bool = False):
    """Multiply with float32 accumulation; float32 operands are not rounded to TF32."""
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision_of("attention", a.dtype))


def attention_forward(kernel: Kernel, q_ref, k_ref, v_ref, out_ref, lse_ref):
    """Write the output and log2-sum-exp2 of one block of queries."""
    begin = pl.program_id(0) * kernel.block_q
    end = jnp.minimum(begin + kernel.block_q, kernel.rule.num_tokens)
    q = load(q_ref, begin, kernel.block_q)
    query = jnp.minimum(begin + jnp.arange(kernel.block_q), kernel.rule.num_tokens - 1)
    first, last = kernel.rule.keys_of(begin, end)

    def visit(i, carry):
        out, top, total = carry
        at = first + i * kernel.block_k
        k, v = load(k_ref, at, kernel.block_k), load(v_ref, at, kernel.block_k)
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


def attention_backward_q(kernel: Kernel, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref):
    """Write the gradient of one block of queries. delta: sum of out * dout of each query."""
    begin = pl.program_id(0) * kernel.block_q
    end = jnp.minimum(begin + kernel.block_q, kernel.rule.num_tokens)
    q, dout, lse, delta = (load(ref, begin, kernel.block_q) for ref in (q_ref, dout_ref, lse_ref, delta_ref))
    query = jnp.minimum(begin + jnp.arange(kernel.block_q), kernel.rule.num_tokens - 1)
    first, last = kernel.rule.keys_of(begin, end)

    def visit(i, dq):
        at = first + i * kernel.block_k
        k, v = load(k_ref, at, kernel.block_k), load(v_ref, at, kernel.block_k)
        logits = dot(q, k, trans_b=True) * (kernel.scale * LOG2_E)
        seen = kernel.rule.is_seen(query, at + jnp.arange(kernel.block_k))
        weights = jnp.where(seen, jnp.exp2(logits - lse[:, None]), 0.0)
        dlogits = weights * (dot(dout, v, trans_b=True) - delta[:, None]) * kernel.scale
        return dq + dot(dlogits.astype(k.dtype), k)

    dq = jnp.zeros(q.shape, jnp.float32)
    store(dq_ref, begin, jax.lax.fori_loop(0, pl.cdiv(last - first, kernel.block_k), visit, dq))


def attention_backward_kv(kernel: Kernel, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref):
    """Write the gradients of one block of `block_q` keys and values, reading `block_k` queries at a time."""
    begin = pl.program_id(0) * kernel.block_q
    end = jnp.minimum(begin + kernel.block_q, kernel.rule.num_tokens)
    k, v = load(k_ref, begin, kernel.block_q), load(v_ref, begin, kernel.block_q)
    key = begin + jnp.arange(kernel.block_q)
    first, last = kernel.rule.queries_of(begin, end)

    def visit(i, carry):
        dk, dv = carry
        at = first + i * kernel.block_k
        q, dout, lse, delta = (load(ref, at, kernel.block_k) for ref in (q_ref, dout_ref, lse_ref, delta_ref))
        query = at + jnp.arange(kernel.block_k)
        seen = kernel.rule.is_seen(query, key) & (query < kernel.rule.num_tokens)[:, None]
        logits = dot(q, k, trans_b=True) * (kernel.scale * LOG2_E)
        weights = jnp.where(seen, jnp.exp2(logits - lse[:, None]), 0.0)
        dv = dv + dot(weights.astype(dout.dtype), dout, trans_a=True)
        dlogits = weights * (dot(dout, v, trans_b=True) - delta[:, None]) * kernel.scale
        return dk + dot(dlogits.astype(q.dtype), q, trans_a=True), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, pl.cdiv(last - first, kernel.block_k), visit, (zeros, zeros))
    store(dk_ref, begin, dk)
    store(dv_ref, begin, dv)


def like(x, shape=None, dtype=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)


def run_forward(kernel: Kernel, q, k, v):
    B, N, H, _ = q.shape
    outputs = [like(q), like(q, (B, H, N), jnp.float32)]
    return tuple(kernel.pallas_call(attention_forward, kernel.block_q, (q, k, v), outputs))


def run_backward(kernel: Kernel, q, k, v, dout, lse, delta):
    inputs = (q, k, v, dout, lse, delta)
    (dq,) = kernel.pallas_call(attention_backward_q, kernel.block_q, inputs, [like(q)])
    dk, dv = kernel.pallas_call(attention_backward_kv, kernel.block_q, inputs, [like(k), like(v)])
    return dq, dk, dv


@functools.cache
def operations(kernel: Kernel):
    """Return the forward and backward functions of a kernel, with vmap and sharding rules."""
    forward = per_device(functools.partial(run_forward, kernel), (4,) * 3, (4, 3))
    backward = per_device(functools.partial(run_backward, kernel), (4,) * 4 + (3, 3), (4,) * 3)
    return forward, backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_flat(kernel: Kernel, q_BNHK, k_BNHK, v_BNHK):
    return operations(kernel)[0](q_BNHK, k_BNHK, v_BNHK)[0]


def attend_flat_forward(kernel, q, k, v):
    # kept by rematerialisation: the backward pass would otherwise run the forward kernel again
    out, lse = (checkpoint_name(x, PRODUCT) for x in operations(kernel)[0](q, k, v))
    return out, (q, k, v, out, lse)


def attend_flat_backward(kernel, residuals, dout):
    q, k, v, out, lse = residuals
    delta = jnp.einsum("bnhk,bnhk->bhn", out, dout, preferred_element_type=jnp.float32)
    return operations(kernel)[1](q, k, v, dout, lse, delta)


attend_flat.defvjp(attend_flat_forward, attend_flat_backward)


def block_shape(dtype, head_width: int) -> tuple[int, int, int]:
    """Return (block_q, block_k, num_warps).

    bfloat16 up to width 64: the fastest of twelve shapes on an H100 (benchmarks/RESULTS.md). Otherwise: the largest
    without register spills on sm_90, found by compiling for it.
    """
    is_wide = head_width > 64
    if dtype == jnp.float32:
        return (16, 16, 8) if is_wide else (32, 32, 8)
    return (32, 32, 4) if is_wide else (64, 64, 4)


def why_not(dtype, head_width: int) -> str | None:
    """Return the reason that the kernels do not support these heads, or None if they do."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    if head_width > MAX_HEAD_WIDTH:
        return f"head width {head_width} is above {MAX_HEAD_WIDTH}"
    return None


def attend(rule: Rule, q_BNHK, k_BNHK, v_BNHK, scale: float, interpret: bool = False) -> jax.Array:
    """Attend by a rule on a CUDA GPU; `interpret` runs it on any platform, slowly."""
    kernel = Kernel(rule, float(scale), *block_shape(q_BNHK.dtype, q_BNHK.shape[-1]), interpret=interpret)
    return attend_flat(kernel, q_BNHK, k_BNHK, v_BNHK)
