"""Transformer layers: adaptive-norm block, attention with normalised q and k, feed-forward (docs/method.md)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from mvar_jax.models.init import normal
from mvar_jax.models.query_key_value import project_together, query_key_value, query_key_value_parameters
from mvar_jax.ops import block_diagonal
from mvar_jax.ops import window as window_attention
from mvar_jax.ops.attention import block_causal_mask, dense_attention, head_scale
from mvar_jax.ops.gelu import gelu
from mvar_jax.ops.norm import modulated_norm
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.products import add_bias, multiply_rows
from mvar_jax.scales import BLOCK_CAUSAL, BLOCK_DIAGONAL, Phase, Pyramid
from mvar_jax.sharding import constrain, is_split, named_axes


class Linear(nn.Module):
    """x `[..., *shape]` times a kernel `[*shape, features]`, plus a bias; shape has `num_axes` axes.

    dtype: of the operands. out_dtype: of the product. part: see `precision.TABLE`. sum_dtype: of the product plus
    the bias, hence of the result; None for out_dtype.
    """

    features: int
    kernel_init: Any
    dtype: Any
    out_dtype: Any
    part: str = "blocks"
    num_axes: int = 1
    sum_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, shape = x.shape[: -self.num_axes], x.shape[-self.num_axes :]
        kernel = self.param("kernel", self.kernel_init, (*shape, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = x.reshape(*rows, -1).astype(self.dtype), kernel.reshape(-1, self.features)
        y = multiply_rows(x, kernel, self.out_dtype, precision_of(self.part, self.dtype))
        return add_bias(y if self.sum_dtype is None else y.astype(self.sum_dtype), bias)


def branch_dtype(dtype: Any) -> Any:
    """Return the dtype in which the last bias of a branch is added: float32 on a GPU.

    XLA then adds it in the kernel that adds the branch. In the product's dtype, cuBLAS would add it, and for that XLA
    copies the layer's weights and bias out of the stacked ones.
    """
    return jnp.float32 if current_platform() == "gpu" else dtype


class Attention(nn.Module):
    """Self-attention over the tokens of one phase; returns the output and the updated cache."""

    pyramid: Pyramid
    phase: Phase
    num_heads: int
    init_std: float
    depth: int
    window_backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, cache: tuple[jax.Array, jax.Array] | None, layer: jax.Array):
        D, x_BND = x_BND.shape[-1], x_BND.astype(self.dtype)
        rule = self.triton_rule(x_BND) if cache is None else None
        if rule is not None:
            y_BNHK = self.attend_raw(rule, x_BND)
        else:
            q, k, v = query_key_value(self, x_BND)
            if cache is not None:
                cache, (k, v) = self.extend_cache(cache, (k, v), layer)
            y_BNHK = self.attend(q, k, v)
        init = named_axes(normal(self.init_std, 1 / np.sqrt(2 * self.depth)), "heads", "head_width", "width")
        out = Linear(D, init, self.dtype, self.dtype, num_axes=2, sum_dtype=branch_dtype(self.dtype), name="proj")
        return out(y_BNHK), cache

    def triton_rule(self, x_BND):
        """Return the rule of the Triton kernels if they are to read the raw product, or None.

        They do so in half precision, if one product has all heads and they would attend anyway.
        """
        if is_split("heads") or x_BND.dtype == jnp.float32:
            return None
        head_width, phase = x_BND.shape[-1] // self.num_heads, self.phase
        if phase.attention == BLOCK_DIAGONAL:
            return block_diagonal.triton_rule(self.areas, x_BND.dtype, head_width)
        if phase.attention == BLOCK_CAUSAL:
            return None
        side, window = self.pyramid.sides[phase.first], self.pyramid.window(phase.first)
        shape = (x_BND.shape[0], side, side, self.num_heads, head_width)
        return window_attention.triton_rule(jax.ShapeDtypeStruct(shape, x_BND.dtype), window, self.window_backend)

    def attend_raw(self, rule, x_BND):
        """Attend with kernels that add the biases and normalise q and k themselves, without passes of their own."""
        from mvar_jax.ops import triton_attention  # Pallas is slow to import

        kernel, q_bias, v_bias, log_scale = query_key_value_parameters(self, x_BND.shape[-1])
        with jax.named_scope("project"):
            qkv = project_together(x_BND, kernel, self.dtype)
            qkv = constrain(qkv, "batch", "tokens", None, "heads", "head_width")
        return triton_attention.attend_raw(rule, qkv, q_bias, v_bias, head_scale(log_scale))

    def extend_cache(self, cache, new, layer):
        """Write the phase's keys and values; return the cache and the layer's part of it up to the phase's end."""
        begin, end = self.phase.begin, self.phase.end

        def extend(past_DBHLK, new_BNHK):
            new = new_BNHK.swapaxes(1, 2)[None]
            past = jax.lax.dynamic_update_slice(past_DBHLK, new, (layer, 0, 0, begin, 0))
            size = (1, *past.shape[1:3], end, past.shape[4])
            return past, jax.lax.dynamic_slice(past, (layer, 0, 0, 0, 0), size)[0].swapaxes(1, 2)

        k, v = (extend(*pair) for pair in zip(cache, new, strict=True))
        return (k[0], v[0]), (k[1], v[1])

    @property
    def areas(self) -> tuple[int, ...]:
        """Return the number of tokens of each scale of the phase."""
        return self.pyramid.areas[self.phase.first : self.phase.last + 1]

    def attend(self, q, k, v):
        """Attend by the phase's rule: scale-Markov, spatial-Markov or VAR (docs/method.md, Attention)."""
        phase = self.phase
        if phase.attention == BLOCK_DIAGONAL:
            return block_diagonal.block_diagonal_attention(q, k, v, self.areas)
        if phase.attention == BLOCK_CAUSAL:
            mask = block_causal_mask(self.pyramid.areas[: phase.last + 1])[phase.begin :]
            return dense_attention(q, k, v, None if mask.all() else mask)
        side = self.pyramid.sides[phase.first]
        window = self.pyramid.window(phase.first)
        q, k, v = (x.reshape(x.shape[0], side, side, *x.shape[2:]) for x in (q, k, v))
        y_BYXHK = window_attention.local_window_attention(q, k, v, window, backend=self.window_backend)
        return y_BYXHK.reshape(y_BYXHK.shape[0], side * side, *y_BYXHK.shape[3:])


class FeedForward(nn.Module):
    """Two linear layers, D -> 4 D -> D, with a tanh-GELU between.

    last_factor: factor of the second one's initial weights.
    """

    init_std: float
    last_factor: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        D = x_BND.shape[-1]
        up, down = normal(self.init_std), normal(self.init_std, self.last_factor)
        # If tokens are many, cuBLAS adds this bias and applies GELU: it takes a copy of the weights, but saves a pass
        # over the activations. If they are few, the copy costs more than the pass.
        sum_dtype = branch_dtype(self.dtype) if math.prod(x_BND.shape[:-1]) < D else None
        widen = Linear(
            4 * D, named_axes(up, "width", "hidden"), self.dtype, self.dtype, sum_dtype=sum_dtype, name="up"
        )
        narrow = Linear(
            D,
            named_axes(down, "hidden", "width"),
            self.dtype,
            self.dtype,
            sum_dtype=branch_dtype(self.dtype),
            name="down",
        )
        return narrow(constrain(gelu(widen(x_BND)), "batch", "tokens", "hidden"))


class Adaptive(nn.Module):
    """SiLU and linear of the condition, `[B, D]` -> `[B, n, D] float32`; `factors` scale each vector at init."""

    num_vectors: int
    init_std: float
    factors: tuple[float, ...]

    @nn.compact
    def __call__(self, cond_BD: jax.Array) -> jax.Array:
        D, n = cond_BD.shape[-1], self.num_vectors
        init = normal(self.init_std, np.asarray(self.factors, np.float32)[:, None])
        kernel = self.param("kernel", named_axes(init, "width", "adaptive", None), (D, n, D))
        bias = self.param("bias", named_axes(nn.initializers.zeros, "adaptive", None), (n, D))
        x_BD, precision = nn.silu(cond_BD), precision_of("blocks", cond_BD.dtype)
        y_BnD = multiply_rows(x_BD, kernel, jnp.float32, precision) + bias
        return constrain(y_BnD, "batch", "adaptive", None)


def in_rows(x_BND: jax.Array) -> jax.Array:
    """Return x with the last axis innermost in a GPU's memory, and its gradient too.

    XLA would put the batch innermost if no loop over the blocks keeps it from that, and copy before every product.
    """
    return with_layout_constraint(x_BND, Layout((0, 1, 2))) if current_platform() == "gpu" else x_BND


def alternate(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Return the rows of one part, or the rows of two parts interleaved; the second may have one row for all."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    pairs = jnp.stack([first, jnp.broadcast_to(second, first.shape)], axis=1)
    return pairs.reshape(-1, *first.shape[1:])


class Block(nn.Module):
    """One layer; its adaptive vectors are gamma1, gamma2, scale1, scale2, shift1, shift2, in this order."""

    pyramid: Pyramid
    phase: Phase
    num_heads: int
    depth: int
    init_std: float
    init_adaptive: float
    init_gamma: float
    shared_aln: bool
    window_backend: str
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, carry, cond, adaptive, path_2B, layer):
        """Apply the layer.

        Args:
          carry: (x_BND, cache).
          cond: class rows `[B, D]`, or the shared vectors `[B, 6, D]` if shared_aln.
          adaptive: this block's precomputed vectors `[B, 6, D]`, as parts for `alternate`; None to compute them.
          path_2B: drop-path factors of the two branches, or None.
          layer: index of this block.
        """
        x_BND, cache = carry
        adaptive = self.adaptive_vectors(cond) if adaptive is None else alternate(adaptive)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (adaptive[:, None, i] for i in range(6))

        # otherwise the backward pass would hold the inner arrays of attention and feed-forward at the same time
        attention = nn.remat(Attention) if self.remat == "full" else Attention
        y, cache = attention(
            self.pyramid,
            self.phase,
            self.num_heads,
            self.init_std,
            self.depth,
            self.window_backend,
            self.dtype,
            name="attention",
        )(modulated_norm(x_BND, scale1, shift1), cache, layer)
        x_BND = self.add_branch(x_BND, gamma1 * y, path_2B, 0)
        feed_forward = FeedForward(self.init_std, 1 / np.sqrt(2 * self.depth), self.dtype, name="ffn")
        y = feed_forward(modulated_norm(x_BND, scale2, shift2))
        x_BND = self.add_branch(x_BND, gamma2 * y, path_2B, 1)
        return (x_BND, cache), None

    def adaptive_vectors(self, cond):
        """Return `[B, 6, D]` from class rows, or from the shared vectors."""
        factors = (self.init_gamma,) * 2 + (self.init_adaptive,) * 4
        if not self.shared_aln:
            return Adaptive(6, self.init_std, factors, name="adaptive")(cond)
        D = cond.shape[-1]
        init = lambda key, shape, dtype=jnp.float32: (
            jax.random.normal(key, shape, dtype) / np.sqrt(D) * np.asarray(factors, np.float32)[:, None]
        )
        return cond + self.param("adaptive_offset", named_axes(init, "adaptive", "width"), (6, D))

    def add_branch(self, x_BND, branch_BND, path_2B, i):
        if path_2B is not None:
            branch_BND = branch_BND * path_2B[i][:, None, None]
        return in_rows(constrain(x_BND + branch_BND.astype(x_BND.dtype), "batch", "tokens", None))
