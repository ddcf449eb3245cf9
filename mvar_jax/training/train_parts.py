"""Training a part of a tokenizer: which parameters move, and the proof that the others did not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.models.tokenizer import decoder_params
from mvar_jax.training.codebook_options import CodebookOptions

# config.train_parts -> the parameters that a step trains
TRAIN_PARTS: dict[str, Callable[[dict], dict]] = {"all": dict, "decoder": decoder_params}


def check_train_parts(train_parts: str, options: CodebookOptions) -> None:
    """Raise InputError unless the parts are known and no option moves what they freeze."""
    known = tuple(TRAIN_PARTS)
    if train_parts not in known:
        expected = " or ".join(known)
        words = f"config.train_parts must be {expected}, got {train_parts!r}"
        raise InputError(words, field="config.train_parts", given=train_parts, expected=expected)
    # options of the codebook, and one that would change the ids' f_hat that the decoder gets
    for name in ("warmup_steps", "revive_every_steps", "simvq", "entropy_weight", "scale_dropout"):
        if train_parts == "decoder" and (given := getattr(options, name)):
            field, off = f"config.codebook.{name}", type(given)(0)
            words = f"{field} must be {off} with config.train_parts=decoder, which keeps the ids, got {given}"
            raise InputError(words, field=field, given=given, expected=str(off))


def bit_sums(params: dict) -> jax.Array:
    """Return the sum of each leaf's bits as integers, modulo 2^32, uint32 [leaves]: equal on any mesh."""
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.stack([jnp.sum(as_bits(x), dtype=jnp.uint32) for x in jax.tree.leaves(params)])
