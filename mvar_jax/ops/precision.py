"""The precision of matrix products and convolutions, in one table.

Unless told otherwise, accelerators round the float32 operands of a product: to TF32 (10 bits) on Ampere and later, to
bfloat16 (7 bits) on TPUs. TF32 in phi alone changes 0.6% of an image's token ids, bfloat16 7.3%.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError

STANDARD, EXACT = PRECISIONS = ("standard", "exact")
HIGHEST = jax.lax.Precision.HIGHEST

# part of the computation -> precision of its products of float32; None: as the platform does them, HIGHEST if exact
TABLE = {
    # the encoder's last two convolutions, distances, phi, resizing (f_hat, teacher-forcing input), post-quant
    "quantizer": HIGHEST,
    "embedding": HIGHEST,  # word embedding; its operands have the model's dtype, which is float32 if exact
    "head": HIGHEST,  # logits; operands as those of the embedding
    "attention": HIGHEST,  # queries with keys, weights with values: every backend, the kernels too
    "mixtures": HIGHEST,  # Gumbel averages of codes, mixed classes
    "sums": HIGHEST,  # sums over the rows of an evaluation
    "losses": HIGHEST,  # the perceptual network; augmentation of what a discriminator sees
    "autoencoder": None,  # the encoder but its end, the decoder but its beginning
    "discriminator": None,  # its convolutions and the frozen network under it
    "blocks": None,  # adaptive vectors; queries, keys, values and output of attention; feed-forward
}


def check_precision(precision: str) -> None:
    """Raise InputError unless a precision is one of PRECISIONS."""
    if precision not in PRECISIONS:
        expected = " or ".join(PRECISIONS)
        message = f"precision must be {expected}, got {precision!r}"
        raise InputError(message, field="precision", given=precision, expected=expected)


def precision_of(part: str, dtype: Any) -> Any:
    """Return the precision of a part's products of this dtype; bfloat16 operands are exact as they are."""
    if jnp.dtype(dtype) != jnp.float32:
        return None
    return TABLE[part] or jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # missing from stubs


def computing(precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which every product that is traced is HIGHEST if `precision` is exact."""
    return jax.default_matmul_precision("highest") if precision == EXACT else contextlib.nullcontext()


def dtype_of_ends(dtype: Any, precision: str) -> Any:
    """Return the dtype of the operands of a model's embedding and head: float32 if `precision` is exact."""
    return jnp.float32 if precision == EXACT else dtype


def in_own_precision(method):
    """Decorate a method of a linen module so that it is traced in `computing(self.precision)`."""

    @functools.wraps(method)
    def traced(self, *args, **kwargs):
        with computing(self.precision):
            return method(self, *args, **kwargs)

    return traced
