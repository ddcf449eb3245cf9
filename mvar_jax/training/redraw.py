"""Redrawing of a tokenizer's unused codes, between steps."""

import jax
import jax.numpy as jnp

from mvar_jax.models.tokenizer import MAP, Tokenizer, multiply_codebook
from mvar_jax.ops.pixels import as_images
from mvar_jax.ops.precision import precision_of
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.state import TrainState


def redraw_codes(model: Tokenizer, options: CodebookOptions, state: TrainState, batch: dict, key: jax.Array):
    """Replace unused codes (all of them at the end of the warm-up) by residual vectors of this batch.

    Coarser scales are likelier to give the vector: tokens of one scale are drawn independently, so an image's global
    content must fit into few of them. The codebook's EMA and moments are replaced too, or they would pull a new code
    back to the old place. Of a codebook E W, at the end of the warm-up, W alone is replaced, see `spread_codes`.
    """
    is_first = state.step == options.warmup_steps
    images = as_images(batch["image"])
    params = multiply_codebook(state.params)
    encoded = model.apply({"params": params}, images, method=lambda m, x: m.quantize(m.features(x)))
    V = model.vocab_size
    pools = [rest.reshape(-1, rest.shape[-1]) for rest in encoded.rests]
    keys = jax.random.split(key, len(pools) + 1)
    picks = jnp.stack(
        [pool[jax.random.randint(k, (V,), 0, pool.shape[0])] for pool, k in zip(pools, keys[1:], strict=True)]
    )
    weights_S = jnp.arange(len(pools), 0, -1, dtype=jnp.float32)
    scale_V = jax.random.categorical(keys[0], jnp.log(weights_S), shape=(V,))
    drawn_Vc = picks[scale_V, jnp.arange(V)]
    if options.simvq:
        return spread_codes(state, drawn_Vc)
    is_dead_V = (jnp.sum(state.extra["hits"], axis=0) < options.revive_below) | is_first
    is_dead_V &= jnp.isfinite(drawn_Vc).all(axis=1)  # features that are not finite must not poison the codebook
    # hits for one step, or a new code would count as unused at once
    grace_SV = jnp.where(is_dead_V[None], options.revive_below, state.extra["hits"])
    state = replace_leaves(state, "codebook", drawn_Vc, is_dead_V[:, None])
    return state.replace(extra={**state.extra, "hits": grace_SV})


def spread_codes(state: TrainState, drawn_Vc: jax.Array) -> TrainState:
    """Replace W of a codebook E W, so that codes have the second moments of these residual vectors.

    E is normal with variance 1/c, so W is sqrt(c) times the symmetric root of the moments.
    """
    V, c = drawn_Vc.shape
    moments_cc = jnp.matmul(drawn_Vc.T, drawn_Vc, precision=precision_of("quantizer", drawn_Vc.dtype)) / V
    values_c, vectors_cc = jnp.linalg.eigh(moments_cc)
    roots_c = jnp.sqrt(c * jnp.maximum(values_c, 0))
    fresh_cc = jnp.matmul(vectors_cc * roots_c, vectors_cc.T, precision=precision_of("quantizer", drawn_Vc.dtype))
    return replace_leaves(state, MAP, fresh_cc, jnp.isfinite(fresh_cc).all())


def replace_leaves(state: TrainState, name: str, fresh: jax.Array, mask: jax.Array) -> TrainState:
    """Return the state with `fresh` where the mask is true in the parameter of this name; its moments become 0."""

    def replace(path, leaf, fresh):
        # every moment and copy of a parameter has its path's last key
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return jnp.where(mask, fresh, leaf) if keys and keys[-1] == name else leaf

    def with_leaf(tree, fresh):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: replace(path, leaf, fresh), tree)

    return state.replace(
        params=with_leaf(state.params, fresh),
        ema=None if state.ema is None else with_leaf(state.ema, fresh),
        opt_state=with_leaf(state.opt_state, jnp.zeros_like(fresh)),
    )
