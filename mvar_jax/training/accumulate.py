"""Gradients accumulated over parts of a batch, so only one part's activations are alive at a time."""

import jax
import jax.numpy as jnp

BATCH_AXES = {"path": 2}  # 0 for the others


def split_parts(batch: dict[str, jax.Array], num_parts: int) -> dict[str, jax.Array]:
    """Return each array with the parts as its first axis; part i has the rows i, i + num_parts, ...

    A device holds consecutive rows: with this stride it keeps its rows in every part.
    """

    def split(name, x):
        axis = BATCH_AXES.get(name, 0)
        shape = x.shape[:axis] + (x.shape[axis] // num_parts, num_parts) + x.shape[axis + 1 :]
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    return {name: split(name, x) for name, x in batch.items() if x is not None}


def value_and_grad_over_parts(loss_fn, params, batch: dict, num_parts: int):
    """Return ((loss, aux), grads) of loss_fn(params, batch) -> (loss, aux), the mean over `num_parts` equal parts.

    The loss and every leaf of aux must be means over rows. One part is exactly `jax.value_and_grad`.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if num_parts == 1:
        return grad_fn(params, batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

    parts = split_parts(batch, num_parts)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(grad_fn, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)
