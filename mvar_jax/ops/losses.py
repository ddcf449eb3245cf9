"""Cross-entropy over token ids, entropy, and the quantizer's commitment loss."""

import itertools

import jax
import jax.numpy as jnp

from mvar_jax.ops.precision import precision_of
from mvar_jax.scales import offsets_of


def token_cross_entropy(logits_BNV: jax.Array, ids_BN: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return (1 - e) * nll - e * mean(log p) in nats, `[B, N] float32`; e is label_smoothing."""
    log_p = jax.nn.log_softmax(logits_BNV.astype(jnp.float32), axis=-1)
    # by comparison, not by index: its gradient is one pass with the softmax's, not a scatter into an array of zeros
    is_id_BNV = jnp.arange(log_p.shape[-1]) == ids_BN[..., None]
    nll = -jnp.sum(jnp.where(is_id_BNV, log_p, 0), axis=-1)
    if label_smoothing == 0:
        return nll
    return (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_p, axis=-1)


def token_entropy(logits_BNV: jax.Array) -> jax.Array:
    """Return the entropy of each token's distribution in nats, `[B, N] float32`."""
    log_p = jax.nn.log_softmax(logits_BNV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def sum_per_scale(x_BN: jax.Array, areas: tuple[int, ...]) -> jax.Array:
    """Sum over each map's tokens: `[B, N]` -> `[B, scales]`."""
    spans = itertools.pairwise(offsets_of(areas))
    return jnp.stack([jnp.sum(x_BN[:, a:b], axis=1) for a, b in spans], axis=1)


def sum_rows(mask_B: jax.Array, x_B: jax.Array) -> jax.Array:
    """Return mask @ x, `[B, ...]` -> `[...] float32`: the sum over the rows of an evaluation that are not padding."""
    return jnp.matmul(mask_B, x_B, precision=precision_of("sums", x_B.dtype))


def commitment_loss(
    f_BYXc: jax.Array, f_hats: tuple[jax.Array, ...], beta: float, num_scales_B: jax.Array | None = None
) -> jax.Array:
    """Return the mean over scales of beta * mse(stop(f_hat), f) + mse(f_hat, stop(f)) (VAR section 3.2).

    num_scales_B: scales that each row keeps; its mean is over these. None keeps all.
    """
    stop = jax.lax.stop_gradient
    axes = None if num_scales_B is None else (1, 2, 3)
    mean_square = lambda x: jnp.mean(jnp.square(x), axis=axes)
    terms = [beta * mean_square(stop(f_hat) - f_BYXc) + mean_square(f_hat - stop(f_BYXc)) for f_hat in f_hats]
    if num_scales_B is None:
        return sum(terms[1:], terms[0]) / len(terms)
    kept_SB = jnp.where(jnp.arange(len(terms))[:, None] < num_scales_B, jnp.stack(terms), 0)
    return jnp.mean(jnp.sum(kept_SB, axis=0) / num_scales_B)
