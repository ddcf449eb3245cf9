"""Local-window attention on TPU: jax's splash attention with the windows as its block-sparse mask.

It has run in Pallas' interpreter and compiles for TPUs, but has not run on one.
"""

import concurrent.futures
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mvar_jax.ops.per_device import per_device
from mvar_jax.ops.window.geometry import window_mask

BLOCK = 128  # the kernel needs whole blocks of tokens
DTYPES = ("bfloat16", "float32")


@functools.lru_cache(maxsize=64)
def padded_mask(height: int, width: int, kernel_size: int) -> np.ndarray:
    """Return `[N, N] bool`, N rounded up to whole blocks; a padding token sees itself, so that no row is empty."""
    N = height * width
    mask = np.eye(-(-N // BLOCK) * BLOCK, dtype=bool)
    mask[:N, :N] = window_mask(height, width, kernel_size)
    return mask


@functools.lru_cache(maxsize=64)
def splash_kernel(height: int, width: int, kernel_size: int, interpret: bool):
    """Return the library's kernel for one head, a tree whose leaves describe the mask's blocks."""
    mask = splash_attention_mask.NumpyMask(padded_mask(height, width, kernel_size))
    one_head = splash_attention_mask.MultiHeadMask([mask])
    make = functools.partial(
        splash_attention_kernel.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    # a thread of its own: it is inside no trace, and no mesh whose devices may belong to other hosts or not be here
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, make(one_head))).result()


def run_splash(kernel, scale: float, q_BNHK, k_BNHK, v_BNHK):
    """Run the kernel on each sample and head separately, padded to whole blocks of tokens."""
    B, N, H, K = q_BNHK.shape

    def blocks(x_BNHK):
        x = jnp.pad(x_BNHK.swapaxes(1, 2), ((0, 0), (0, 0), (0, -N % BLOCK), (0, 0)))
        return x.reshape(B * H, 1, -1, K)

    # one pass of the matrix unit would round float32 to bfloat16
    exact = jax.default_matmul_precision("highest") if q_BNHK.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        q = blocks(q_BNHK * jnp.asarray(scale, q_BNHK.dtype))
        out = jax.vmap(kernel)(q, blocks(k_BNHK), blocks(v_BNHK))
    return out.reshape(B, H, -1, K)[:, :, :N].swapaxes(1, 2).astype(v_BNHK.dtype)


@functools.cache
def operations(height: int, width: int, kernel_size: int, scale: float, interpret: bool):
    """Return the forward and backward functions of a map, window, scale and mode, with vmap and sharding rules.

    The backward pass runs the forward pass again, since the library does not expose its residuals.
    """
    leaves, structure = jax.tree.flatten(splash_kernel(height, width, kernel_size, interpret))
    constants = tuple(leaves)

    def forward(*arrays):
        kernel = jax.tree.unflatten(structure, arrays[: len(constants)])
        return (run_splash(kernel, scale, *arrays[len(constants) :]),)

    def backward(*arrays):
        kernel = jax.tree.unflatten(structure, arrays[: len(constants)])
        *qkv, dout = arrays[len(constants) :]
        return jax.vjp(functools.partial(run_splash, kernel, scale), *qkv)[1](dout)

    return per_device(forward, ("bnhk",) * 3, ("bnhk",), constants), per_device(
        backward, ("bnhk",) * 4, ("bnhk",) * 3, constants
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_flat(setting: tuple, q_BNHK, k_BNHK, v_BNHK):
    return operations(*setting)[0](q_BNHK, k_BNHK, v_BNHK)[0]


def attend_flat_forward(setting, q, k, v):
    return attend_flat(setting, q, k, v), (q, k, v)


def attend_flat_backward(setting, residuals, dout):
    return operations(*setting)[1](*residuals, dout)


attend_flat.defvjp(attend_flat_forward, attend_flat_backward)


def why_not(q_BYXHK) -> str | None:
    """Return the reason that this backend does not support q, or None if it does."""
    if q_BYXHK.dtype not in DTYPES:
        return f"dtype {q_BYXHK.dtype} is not one of {', '.join(DTYPES)}"
    return None


def attend(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float, interpret: bool = False) -> jax.Array:
    """Compute local-window attention on a TPU; `interpret` runs it on any platform, slowly."""
    B, Y, X, H, K = q_BYXHK.shape
    setting = (Y, X, kernel_size, float(scale), interpret)
    flat = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
    return attend_flat(setting, *flat).reshape(q_BYXHK.shape)
