"""Drawing of one map by the refiner, wave by wave (docs/method.md, Refiner).

The noise of a token is the one that it has without a refiner, and does not depend on the wave in which it is drawn.
The kernel of ops/draw_gpu.py is not used: its rows are those of a whole map.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.models import draw_order
from mvar_jax.models.networks import Networks
from mvar_jax.ops.sampling import gumbel_noise, mix_codes, smooth_weights
from mvar_jax.sampling.options import Known, SampleOptions


class Unrefined(NamedTuple):
    """What the transformer gives the refiner at a scale.

    Attributes:
      hidden_RND: hidden states, a row for each sample, or with guidance pairs of rows: class and "no class".
      guidance: t of `guide`, None without guidance.
    """

    hidden_RND: jax.Array
    guidance: Any


def draw_refined(
    networks: Networks,
    scale: int,
    unrefined: Unrefined,
    keys_B: jax.Array,
    options: SampleOptions,
    noise=gumbel_noise,
    known: Known | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw the tokens of one map, each given the tokens drawn before it.

    Args:
      networks: with the refiner.
      scale: the map.
      unrefined: of the transformer at this scale.
      keys_B: one random key per sample, of this scale.
      options: of this scale, applied to the refined logits.
      noise: see `sample_pyramid`.
      known: tokens that are not drawn; the refiner sees them in their places.

    Returns (ids `[B, N] int32`, codes `[B, N, c]`, guided logits `[B, N, V]` before the filters).
    """
    refiner, codebook = networks.refiner, networks.tokenizer_params["codebook"]
    # the refiner's first product rounds them to this dtype; held in it through the loop they take half the memory
    hidden_RND, guidance = unrefined.hidden_RND.astype(refiner.end_dtype), unrefined.guidance
    waves_Tn = draw_order.waves(refiner.sides[scale], refiner.window)
    B, N, V, num_scales = len(keys_B), hidden_RND.shape[1], refiner.vocab_size, len(refiner.sides)
    shape = jax.ShapeDtypeStruct((B, N, V), jnp.float32)
    gumbel_BNV = gumbel_noise(shape, keys_B)
    smooth_BNV = gumbel_BNV if noise is gumbel_noise else noise(shape, keys_B)

    def draw_wave(carry, places_n):
        ids_BP, caches = carry
        row = jnp.minimum(places_n, N - 1)  # of the dummy place, whose result is not read
        arguments = hidden_RND[:, row], places_n, ids_BP, caches, codebook, guidance
        logits_BnV, caches = refiner.apply({"params": networks.refiner_params}, *arguments, method="draw_step")
        filtered = options.apply(logits_BnV)
        ids_Bn = jnp.argmax(filtered + gumbel_BNV[:, row], axis=-1).astype(jnp.int32)
        codes_Bnc = None
        if options.smooth:
            codes_Bnc = mix_codes(smooth_weights(filtered, smooth_BNV[:, row], scale, num_scales), codebook)
        drawn_Bn1 = ids_Bn[..., None]  # their codes are mixed with those of the known ids afterwards
        if known is not None:
            ids_Bn = known.keep(ids_Bn, row)
        return (ids_BP.at[:, places_n].set(ids_Bn), caches), (codes_Bnc, drawn_Bn1, logits_BnV)

    start = jnp.zeros((B, N + 1), jnp.int32), refiner.empty_caches(scale, len(hidden_RND))
    (ids_BP, _), waves = jax.lax.scan(draw_wave, start, jnp.asarray(waves_Tn))
    place_of_N = np.argsort(waves_Tn.reshape(-1), kind="stable")[:N]  # the dummies come last
    in_order = lambda x_TBn: jnp.moveaxis(x_TBn, 0, 1).reshape(B, waves_Tn.size, -1)[:, place_of_N]
    codes_BNc, drawn_BN1, logits_BNV = jax.tree.map(in_order, waves)
    return ids_BP[:, :N], codebook[drawn_BN1[..., 0]] if codes_BNc is None else codes_BNc, logits_BNV
