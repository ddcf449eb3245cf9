"""A small tokenizer and transformer for properties, and seeded parameters that need no compiled initialisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from golden_case import quick_jit

from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer, previous_of

SIDES = (1, 2, 4, 5)
TOKENIZER = Tokenizer(
    SIDES, vocab_size=16, code_width=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, num_phi=2
)
MODEL = Transformer(
    SIDES,
    refine_step=2,
    kernel_size=3,
    vocab_size=16,
    code_width=4,
    num_classes=3,
    depth=2,
    width=16,
    num_heads=2,
)
NUM_TOKENS = MODEL.pyramid.num_tokens
# the least of both that still has a coarse and a fine scale: 6 x 6 pixels
TINY_MODULES = {"tokenizer": TOKENIZER.clone(sides=(1, 3)), "transformer": MODEL.clone(sides=(1, 3))}


def shapes_of(module):
    """Return the parameter tree as shapes; nothing is compiled."""
    return nn.meta.unbox(jax.eval_shape(module.init_params, jax.random.key(0)))


def seeded_params(module, seed: int = 0, std: float = 0.3):
    """Return normal parameters, with which every part of the module affects its output, unlike after its own init."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(std * rng.normal(size=x.shape), jnp.float32), shapes_of(module))


def tiny_params() -> dict:
    """Return parameters of TINY_MODULES."""
    return {kind: seeded_params(module, std=0.5) for kind, module in TINY_MODULES.items()}


def seeded_batch(model=MODEL, batch_size: int = 2, seed: int = 0) -> dict:
    """ids, label, index and a teacher-forcing input of random numbers."""
    rng = np.random.default_rng(seed)
    num_tokens, num_start = model.pyramid.num_tokens, model.pyramid.areas[0]
    previous = rng.normal(size=(batch_size, num_tokens - num_start, model.code_width))
    return {
        "ids": jnp.asarray(rng.integers(0, model.vocab_size, (batch_size, num_tokens)), jnp.int32),
        "label": jnp.asarray(rng.integers(0, model.num_classes, batch_size), jnp.int32),
        "index": jnp.arange(batch_size),
        "previous": jnp.asarray(previous, jnp.float32),
    }


def apply_phase(model, phase, params, batch, path=None):
    """Logits of one phase."""
    previous = previous_of(batch["previous"], phase, model.pyramid.areas[0])
    return model.apply({"params": params}, previous, batch["label"], phase, path)[0]


phase_logits = quick_jit(apply_phase, static_argnums=(0, 1))


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
