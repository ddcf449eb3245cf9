"""Sampling of token pyramids, scale by scale (MVAR section 3; docs/method.md, Sampling)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.models.networks import Networks
from mvar_jax.models.transformer import Modulation, Transformer, modulate
from mvar_jax.ops.pixels import to_levels
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.quantize import next_input
from mvar_jax.ops.sampling import (
    draw,
    guidance_strength,
    gumbel_noise,
    mix_codes,
    smooth_weights,
)
from mvar_jax.sampling.options import Known, SampleOptions
from mvar_jax.sampling.refining import Unrefined, draw_refined
from mvar_jax.sharding import constrain, is_split, map_rows

# Bytes of activations that the decoder may hold: otherwise its last stage would dominate memory. Each of its stages
# takes as many images at once as fit, so that the coarse ones fill an accelerator. On a CPU convolutions are fastest
# one image by one: 12.5 s for four images of 256 px, 14.5 s together.
DECODER_BYTES = {"cpu": 0, "gpu": 2**27, "tpu": 2**27}
MAPS_HELD = 3  # at once in a residual block: its input, a normalised map and a convolution's result
# Logits filtered at once: otherwise the filters' arrays would be the largest of the program. On a CPU they stay in
# the cache: 0.8 of the time.
DRAW_ELEMENTS = {"cpu": 2**20, "gpu": 2**24, "tpu": 2**24}

# (scale, previous_BNc, carry) -> (guided logits [B, N, V], or what the refiner takes, carry)
LogitsFn = Callable[[int, jax.Array, Any], tuple[Any, Any]]


def sample_pyramid(
    logits_fn: LogitsFn,
    networks: Networks,
    keys_B,
    options: SampleOptions,
    noise=gumbel_noise,
    known: Callable[[int], Known] | None = None,
):
    """Draw every scale from the logits of `logits_fn`.

    Args:
      networks: `Networks.at` tells which of them draw a scale.
      keys_B: one random key per sample.
      noise: (logits_BNV, keys_B) -> Gumbel noise of the smooth mode.
      known: returns the known tokens of a scale, as editing does; None: there are none.

    A scale that the refiner refines is drawn by `draw_refined`.

    Returns (ids `[B, L] int32`, f_hat `[B, Y, X, c] float32`, guided logits of each scale before the filters).
    """
    sides, code_width = networks.tokenizer.sides, networks.tokenizer.code_width
    codebook = networks.tokenizer_params["codebook"]
    B = keys_B.shape[0]
    f_hat = jnp.zeros((B, sides[-1], sides[-1], code_width))
    previous, carry = jnp.zeros((B, 0, code_width)), None
    ids, all_logits = [], []
    for scale in range(len(sides)):
        found, carry = logits_fn(scale, previous, carry)
        scale_keys = jax.vmap(functools.partial(jax.random.fold_in, data=scale))(keys_B)
        known_here, here = None if known is None else known(scale), options.at(scale, len(sides))
        if (drawing := networks.at(scale)).refines(scale):
            arguments = drawing, scale, found, scale_keys, here, noise, known_here
            ids_BN, codes, logits_BNV = draw_refined(*arguments)
        else:
            logits_BNV = found
            ids_BN, codes = draw_scale(logits_BNV, scale_keys, codebook, here, scale, len(sides), noise)
        all_logits.append(logits_BNV)
        if known_here is not None:
            ids_BN, codes = known_here.keep(ids_BN), known_here.mix(codes, codebook)
        ids.append(ids_BN)
        f_hat = networks.apply_tokenizer(f_hat, codes, scale, method="add_codes")
        if scale + 1 < len(sides):
            previous = next_input(f_hat, scale, sides)
    return jnp.concatenate(ids, axis=1), f_hat, all_logits


def draw_scale(logits_BNV, keys_B, codebook, options: SampleOptions, scale: int, num_scales: int, noise):
    """Filter and draw one scale; return (ids `[B, N]`, codes `[B, N, c]`).

    options: of this scale, with one temperature.

    By a kernel on a GPU, otherwise by XLA; in chunks of samples if arrays `[B, N, V]` are made.
    """
    _, N, V = logits_BNV.shape
    num_together = max(1, DRAW_ELEMENTS[current_platform()] // (N * V))
    if noise is gumbel_noise and current_platform() == "gpu":
        from mvar_jax.ops import draw_gpu  # Pallas is slow to import

        if draw_gpu.why_not(logits_BNV, keys_B) is None:
            place = (scale, num_scales) if options.smooth else None
            kernel = draw_gpu.Kernel(options.top_k, options.top_p, options.temperature, place)
            if not options.smooth:
                (ids_BN,) = draw_gpu.draw_filtered(kernel, logits_BNV, keys_B)
                return ids_BN, codebook[ids_BN]

            def draw_by_kernel(rows):
                ids_bN, weights_bNV = draw_gpu.draw_filtered(kernel, *rows)
                return ids_bN, mix_codes(weights_bNV, codebook)

            return map_rows(draw_by_kernel, (logits_BNV, keys_B), num_together)

    def draw_some(rows):
        logits_bNV, keys_b = rows
        filtered = options.apply(logits_bNV)
        ids_bN = draw(filtered, keys_b)
        if not options.smooth:
            return ids_bN, codebook[ids_bN]
        return ids_bN, mix_codes(smooth_weights(filtered, noise(filtered, keys_b), scale, num_scales), codebook)

    return map_rows(draw_some, (logits_BNV, keys_B), num_together)


def modulations(model: Transformer, params, labels_B: jax.Array, is_guided: bool) -> tuple[Modulation, ...]:
    """Return the `Modulation` of labels and, if guided, of "no class", one row for all samples.

    One product makes both: for a single row XLA would copy the weights transposed on a GPU. If a mesh splits the
    batch, each has its own, since one row more does not divide.
    """
    if not is_guided:
        return (modulate(model, params, labels_B),)
    no_class = jnp.full((1,), model.num_classes)
    if is_split("batch"):
        return modulate(model, params, labels_B), modulate(model, params, no_class)
    rows = modulate(model, params, jnp.concatenate([labels_B, no_class]))
    return tuple(Modulation(rows.cond[cut], rows.blocks[:, cut], rows.head[cut]) for cut in (np.s_[:-1], np.s_[-1:]))


def guided_logits(networks: Networks, labels_B: jax.Array, cfg: float | jax.Array) -> LogitsFn:
    """Return the transformer as a `LogitsFn`: (1 + t) * cond - t * uncond with t = cfg * l / (S - 1).

    Markov: cfg of exactly 1 means conditional logits only, as in the published program, and a scale with t = 0 needs
    no unconditional rows. VAR is guided at cfg 1 too and carries the keys and values of the coarser scales.
    For a scale that the refiner draws, it returns the hidden states of both rows and t instead, as `Unrefined`.
    At a switch the later networks take over without a cache.

    cfg: a number, or an array `[B]` of which all values share one program.
    """
    if networks.later is not None:
        both = [guided_logits(part, labels_B, cfg) for part in networks.parts()]

        def of_both(scale, previous_BNc, cache):
            cache = None if scale == networks.switch else cache
            return both[scale >= networks.switch](scale, previous_BNc, cache)

        return of_both
    # a program of all scales with a copy of every block for each would compile for many minutes
    model, params = networks.transformer.clone(scan_unroll=1), networks.params
    pyramid, is_var = model.pyramid, model.conditioning == "full"
    is_array = isinstance(cfg, jax.Array)
    is_guided = is_array or (cfg != 0 and (is_var or cfg != 1))
    if is_array:
        cfg = (cfg if is_var else jnp.where(cfg == 1, 0, cfg))[:, None, None]
    parts = modulations(model, params, labels_B, is_guided)

    def logits_fn(scale, previous_BNc, cache):
        strength = guidance_strength(cfg, scale, pyramid.num_scales) if is_guided else 0.0
        # VAR needs the cache of conditional and unconditional rows from the first scale on
        has_both = is_guided and (is_array or is_var or strength > 0)
        # the two rows of a sample are adjacent, so that a sharded batch keeps both on one device
        previous = jnp.repeat(previous_BNc, 2, axis=0) if has_both else previous_BNc
        phase = pyramid.scale_phase(scale, model.conditioning)
        if is_var and cache is None:
            cache = model.empty_cache(len(previous))
        rows = parts if has_both else parts[:1]
        mixed = strength if has_both else None
        if not networks.refines(scale):
            return model.apply({"params": params}, previous, None, phase, None, cache, rows, mixed)
        hidden, cache = model.apply({"params": params}, previous, None, phase, None, cache, rows, returns_hidden=True)
        return Unrefined(hidden, mixed), cache

    return logits_fn


def decode_in_chunks(networks: Networks, f_hat_BYXc: jax.Array) -> jax.Array:
    """Decode latent maps to float32 images in [-1, 1], a chunk at a time on each device; call inside a program.

    Each chunk of one of the decoder's stages is cut again for the next, which has larger maps.
    """
    networks = networks.for_decoding()
    tokenizer, most = networks.tokenizer, DECODER_BYTES[current_platform()]

    def decode(x_BYXC, first: int):
        if first == tokenizer.num_stages:
            return jnp.clip(x_BYXC, -1, 1)

        def decode_chunk(x):
            x = networks.apply_tokenizer(x, range(first, first + 1), method="decode_stages")
            return decode(x, first + 1)

        num_together = max(1, most // (MAPS_HELD * tokenizer.stage_bytes(first)))
        return map_rows(decode_chunk, x_BYXC, num_together)

    return decode(f_hat_BYXc, 0)


@jax.jit
def decode_features(networks: Networks, f_hat_BYXc: jax.Array) -> jax.Array:
    """Decode latent maps to float32 images in [-1, 1], as a program of its own."""
    return decode_in_chunks(networks, f_hat_BYXc)


@functools.partial(jax.jit, static_argnames=("options", "outputs"))
def sample(
    networks: Networks,
    labels_B,
    keys_B,
    options: SampleOptions,
    outputs: tuple[str, ...] = ("ids", "f_hat"),
) -> tuple[jax.Array, ...]:
    """Sample images of classes, in one program for each batch size, options and outputs.

    Weights may be sharded over a mesh, and the batch over its batch axes.

    Args:
      labels_B: `[B] int32`.
      keys_B: one random key per sample, see `keys_of_samples`.
      outputs: any of "ids" `[B, L] int32`; "f_hat" `[B, y, x, c] float32`; "images" `[B, Y, X, 3] float32` in
        [-1, 1]; "pixels" and "floor_pixels" `[B, Y, X, 3] uint8`, rounded to nearest and down.

    Returns the outputs in this order.
    """
    logits_fn = guided_logits(networks, labels_B, options.cfg)
    ids_BL, f_hat, _ = sample_pyramid(logits_fn, networks, keys_B, options)
    values = {"ids": ids_BL, "f_hat": f_hat}
    if set(outputs) - set(values):
        values["images"] = decode_in_chunks(networks, f_hat)
        values["pixels"] = to_levels(values["images"])
        values["floor_pixels"] = to_levels(values["images"], truncate=True)
    return tuple(constrain(values[name], "batch", *(None,) * (values[name].ndim - 1)) for name in outputs)
