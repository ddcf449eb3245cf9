"""Queries, keys and values of an attention layer: parameters, and products for each platform."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mvar_jax.models.init import normal
from mvar_jax.ops.attention import normalise_query_key
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.products import add_bias, multiply, multiply_rows
from mvar_jax.sharding import constrain, is_split, named_axes


def query_key_value(module: nn.Module, x_BND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, keys and values, `[B, N, H, K]` each, with q and k normalised and biases added.

    Call inside a compact method: the parameters are those of `module`, see `query_key_value_parameters`.
    """
    kernel, q_bias, v_bias, log_scale = query_key_value_parameters(module, x_BND.shape[-1])
    q, k, v = project(x_BND, kernel, module.dtype)
    q, k = normalise_query_key(add_bias(q, q_bias), k, log_scale)
    return q, k, add_bias(v, v_bias)


def query_key_value_parameters(module: nn.Module, width: int) -> tuple[jax.Array, ...]:
    """Return kernel, q_bias, v_bias and log_scale of `module`, which has num_heads, init_std and dtype."""
    H, K = module.num_heads, width // module.num_heads
    init = named_axes(normal(module.init_std), "width", None, "heads", "head_width")
    kernel = module.param("qkv", init, (width, 3, H, K))
    bias_axes = ("heads", "head_width")
    q_bias = module.param("q_bias", named_axes(nn.initializers.zeros, *bias_axes), (H, K))
    v_bias = module.param("v_bias", named_axes(nn.initializers.zeros, *bias_axes), (H, K))
    log_scale = module.param("log_scale", named_axes(nn.initializers.constant(np.log(4.0)), "heads"), (H,))
    return kernel, q_bias, v_bias, log_scale


@jax.named_scope("project")
def project(x_BND: jax.Array, kernel_D3HK: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """Return the products with the three parts of a kernel, `[B, N, H, K]` each."""
    precision, axes = precision_of("blocks", dtype), ("batch", "tokens", "heads", "head_width")
    num_devices, platform = jax.sharding.get_abstract_mesh().size, current_platform()
    # one einsum on TPUs, where three products of matrices move more memory, and over several CPU devices, where
    # collectives of independent products can wait for each other for ever
    if platform == "tpu" or (platform == "cpu" and num_devices > 1):
        qkv = multiply("bnd,dthk->tbnhk", dtype, precision, x_BND, kernel_D3HK)
        return tuple(constrain(qkv, None, *axes))
    # one product on a GPU that has all heads: XLA would join three and copy their weights side by side each time
    if platform == "gpu" and not is_split("heads"):
        qkv = project_together(x_BND, kernel_D3HK, dtype)
        return tuple(constrain(qkv[:, :, i], *axes) for i in range(3))
    # one product each: columns of all three together would mix whole axes with one that a mesh may split
    parts = (multiply_rows(x_BND, kernel_D3HK[:, i], dtype, precision) for i in range(3))
    return tuple(constrain(part, *axes) for part in parts)


def project_together(x_BND: jax.Array, kernel_D3HK: jax.Array, dtype: Any) -> jax.Array:
    """Return the product with all parts of a kernel, `[B, N, 3, H, K]`."""
    return multiply_rows(x_BND, kernel_D3HK, dtype, precision_of("blocks", dtype))
