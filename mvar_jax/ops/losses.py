"""Cross-entropy over token ids and the quantizer's commitment loss."""

import jax
import jax.numpy as jnp
import numpy as np


def token_cross_entropy(logits_BNV: jax.Array, ids_BN: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """float32 [B, N]: (1 - e) * nll - e * mean(log p), in nats."""
    log_p = jax.nn.log_softmax(logits_BNV.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_p, ids_BN[..., None], axis=-1)[..., 0]
    if label_smoothing == 0:
        return nll
    return (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_p, axis=-1)


def sum_per_scale(x_BN: jax.Array, areas: tuple[int, ...]) -> jax.Array:
    """[B, N] -> [B, scales]: sums over each map's tokens."""
    bounds = np.cumsum((0, *areas))
    spans = zip(bounds[:-1], bounds[1:], strict=True)
    return jnp.stack([jnp.sum(x_BN[:, a:b], axis=1) for a, b in spans], axis=1)


def commitment_loss(f_BYXc: jax.Array, f_hats: tuple[jax.Array, ...], beta: float) -> jax.Array:
    """Mean over scales of mse(stop(f_hat), f) * beta + mse(f_hat, stop(f)) (VAR, equation of the tokenizer loss)."""
    stop = jax.lax.stop_gradient
    terms = [
        beta * jnp.mean(jnp.square(stop(f_hat) - f_BYXc)) + jnp.mean(jnp.square(f_hat - stop(f_BYXc)))
        for f_hat in f_hats
    ]
    return sum(terms[1:], terms[0]) / len(terms)
