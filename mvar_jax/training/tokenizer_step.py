"""Steps of the tokenizer: losses and updates."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.models.lpips import Lpips
from mvar_jax.models.tokenizer import MAP, Tokenizer, multiply_codebook
from mvar_jax.ops.losses import sum_rows
from mvar_jax.ops.metrics import SSIM_WINDOW, perplexities, psnr_of_error, similarity, usage_percent
from mvar_jax.ops.pixels import as_images, repeat_grey
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.scales import areas_of, offsets_of
from mvar_jax.training.accumulate import value_and_grad_over_parts
from mvar_jax.training.adversary import Adversary, FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import TrainState
from mvar_jax.training.tokenizer_losses import (
    Generated,
    Judge,
    adversarial_gradients,
    apply_training,
    checked_loss,
    draw_passes,
    pixel_loss,
    train_discriminator,
)
from mvar_jax.training.train_parts import TRAIN_PARTS

NUM_ENTROPY_TOKENS = 2048  # of a step
SCALES_KEY, TOKENS_KEY = 0, 1  # folded into a row's key


def count_hits(ids_BL: jax.Array, sides: tuple[int, ...], vocab_size: int) -> jax.Array:
    """Return float32 [S, V]: how often each scale of the batch chose each code."""
    spans = itertools.pairwise(offsets_of(areas_of(sides)))
    return jnp.stack(
        [jnp.bincount(ids_BL[:, a:b].reshape(-1), length=vocab_size).astype(jnp.float32) for a, b in spans]
    )


def draw_rows(recipe: "TokenizerRecipe", batch: dict) -> dict[str, jax.Array]:
    """Return what the rows of a batch draw: functions of (seed, the row's place in the training stream) alone.

    `num_scales` [B]: first scales that the row keeps; `tokens` [B, m]: places of its tokens that the entropy term
    takes; each only if the recipe uses it.
    """
    options, sides, drawn = recipe.options, recipe.model.sides, {}
    if options.scale_dropout:
        drawn["num_scales"] = draw_num_scales(options, len(sides), keys_of_samples(recipe.seed, batch["index"]))
    if options.entropy_weight:
        num = max(1, NUM_ENTROPY_TOKENS // len(batch["index"]))
        drawn["tokens"] = draw_tokens(sides, keys_of_samples(recipe.seed, batch["index"]), num)
    return drawn


def draw_num_scales(options: CodebookOptions, num_scales: int, keys_B: jax.Array) -> jax.Array:
    """Return how many scales each row keeps, `[B] int32`."""
    draws_B2 = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, SCALES_KEY), (2,)))(keys_B)
    first = options.scale_dropout_first
    kept_B = first + (draws_B2[:, 1] * (num_scales - first + 1)).astype(jnp.int32)
    return jnp.where(draws_B2[:, 0] < options.scale_dropout, kept_B, num_scales)


def draw_tokens(sides: tuple[int, ...], keys_B: jax.Array, num: int) -> jax.Array:
    """Return the places of `num` tokens of each row, `[B, num] int32`; every scale is as likely."""
    areas_S = jnp.asarray(areas_of(sides))
    begins_S = jnp.asarray(offsets_of(areas_of(sides)))[:-1]

    def draw(key):
        in_scales_m, in_maps_m = jax.random.uniform(jax.random.fold_in(key, TOKENS_KEY), (2, num))
        scale_m = (in_scales_m * len(sides)).astype(jnp.int32)
        return begins_S[scale_m] + (in_maps_m * areas_S[scale_m]).astype(jnp.int32)

    return jax.vmap(draw)(keys_B)


class EntropyTerm(NamedTuple):
    """The entropy term of a step.

    Attributes:
      weight: of this step.
      temperature: see `CodebookOptions`.
      row_stride: it takes tokens of every row_stride-th row alone, so that a large batch has no more of them.
    """

    weight: jax.Array | float
    temperature: float
    row_stride: int = 1

    def of(self, model: Tokenizer, params, rests: tuple[jax.Array, ...], tokens_Bm: jax.Array) -> jax.Array:
        """Return the term, without its weight. rests: of `Encoded`."""
        num = max(1, len(tokens_Bm) // self.row_stride)
        rows = slice(0, num * self.row_stride, self.row_stride)
        chosen = tuple(rest[rows] for rest in rests), tokens_Bm[rows]
        return model.apply({"params": params}, *chosen, self.temperature, method="assignment_entropy")


def entropy_term(options: CodebookOptions, step: jax.Array, batch_size: int) -> EntropyTerm | None:
    """Return the entropy term of a step, None if it has none."""
    if not options.entropy_weight:
        return None
    stride = math.ceil(batch_size / NUM_ENTROPY_TOKENS)
    return EntropyTerm(options.entropy_weight_at(step), options.entropy_temperature, stride)


def forward(model: Tokenizer, params, rows: dict, use_codes, entropy: EntropyTerm | None = None):
    """Return ((reconstruction, quantizer loss), (input of the decoder's last convolution, parts)).

    The quantizer loss includes the weighted entropy term, if there is one.

    Args:
      model, params: the tokenizer; its codebook may be in factors.
      rows: `image`, and what of `draw_rows` there is.
      use_codes: see `Tokenizer.__call__`.
      entropy: if not None, rows need `tokens`.

    parts, means over the batch: `quantizer_loss` and `entropy_loss` by themselves, `hits` [S, V] per image.
    """
    params, images = multiply_codebook(params), rows["image"]
    (rec, quantizer_loss, encoded), features = apply_training(
        model, params, images, use_codes, rows.get("num_scales")
    )
    hits_SV = count_hits(encoded.ids_BL, model.sides, model.vocab_size) / images.shape[0]
    loss, parts = quantizer_loss, {"quantizer_loss": quantizer_loss, "hits": hits_SV}
    if entropy is not None:
        parts["entropy_loss"] = entropy.of(model, params, encoded.rests, rows["tokens"])
        loss += entropy.weight * parts["entropy_loss"]
    return (rec, loss), (features, parts)


def tokenizer_loss(
    model: Tokenizer,
    options: CodebookOptions,
    params,
    rows: dict,
    use_codes,
    fixed=FixedWeights(),  # noqa: B008
    entropy: EntropyTerm | None = None,
):
    """Return (loss, parts): the losses of the raw reconstruction's pixels plus those of the quantizer.

    parts: those of `forward` and `pixel_loss`.
    """
    (rec, quantizer_loss), (_, parts) = forward(model, params, rows, use_codes, entropy)
    loss, of_pixels = pixel_loss(options.pixel_weights, fixed, rec, rows["image"])
    return loss + quantizer_loss, parts | of_pixels


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """The constants of all steps of a run: hashable, so static in a compiled step.

    num_parts: equal parts of a batch whose gradients are accumulated. seed: of scale dropout, of the entropy term's
    tokens, and of the augmentation of what the discriminator sees. adversary: of the steps that have one.
    train_parts: all, or decoder: the ids and all parameters that they depend on stay as they are.
    """

    model: Tokenizer
    optimizer: OptimizerOptions
    options: CodebookOptions
    num_parts: int = 1
    seed: int = 0
    adversary: Adversary | None = None
    train_parts: str = "all"

    def trained(self, params: dict) -> dict:
        """Return the parameters that a step trains."""
        return TRAIN_PARTS[self.train_parts](params)


def gradients(
    recipe: TokenizerRecipe, state: TrainState, batch: dict, trained: dict, fixed: FixedWeights
) -> tuple[jax.Array, dict, dict, Generated | None]:
    """Return (loss, parts, gradients of what is trained, what the discriminator needs; None without an adversary).

    Only what is trained is differentiated, so a frozen encoder has no backward pass. Arguments are those of
    `train_step`; trained: parameters of `recipe.trained`. parts: those of `forward` and `pixel_loss`.
    """
    model, options, adversary = recipe.model, recipe.options, recipe.adversary
    use_codes = state.step >= options.warmup_steps
    entropy = entropy_term(options, state.step, len(batch["image"]))
    rows = {"image": as_images(batch["image"]), **draw_rows(recipe, batch)}
    generated = None
    whole = lambda params: state.params | params
    if adversary is None:
        loss_fn = lambda params, part: tokenizer_loss(model, options, whole(params), part, use_codes, fixed, entropy)
        (loss, parts), grads = value_and_grad_over_parts(loss_fn, trained, rows, recipe.num_parts)
    else:
        if adversary.options.augment:
            rows["draws"] = draw_passes(recipe.seed, batch["index"], state.step)
        last, part = state.params["decoder"]["conv_out"], state.extra["adversary"]
        generated = adversarial_gradients(
            lambda params, part: forward(model, whole(params), part, use_codes, entropy),
            trained,
            rows,
            recipe.num_parts,
            Judge(model, options.pixel_weights, adversary, fixed, last, part),
            adversary.options.weight_at(state.step),
        )
        loss, parts, grads = generated.loss, generated.parts, generated.grads
    if options.warmup_steps:  # nothing may move the codebook before the codes are drawn
        name = MAP if options.simvq else "codebook"
        grads = {**grads, name: jnp.where(use_codes, grads[name], 0.0)}
    return loss, parts, grads, generated


def average_hits(options: CodebookOptions, state: TrainState, hits_SV: jax.Array) -> jax.Array:
    """Return the usage moving average after a step with these hits, `[S, V]`."""
    is_early = state.step < options.warmup_steps + options.usage_early_steps
    decay = jnp.where(is_early, options.usage_decay_early, options.usage_decay)
    return decay * state.extra["hits"] + (1 - decay) * hits_SV


def train_step(
    recipe: TokenizerRecipe,
    state: TrainState,
    batch: dict,
    learning_rate: jax.Array,
    weight_decay: jax.Array,
    discriminator_rate: jax.Array | float = 0.0,
    fixed: FixedWeights = FixedWeights(),  # noqa: B008
):
    """Take one optimizer step, with an adversary one of each network. Jit with the recipe static.

    Args:
      recipe: constants of the step.
      state: `extra.hits` is the usage moving average [S, V], `extra.adversary` that of `Adversary.init_state`, which
        a step without an adversary leaves alone.
      batch: `image`, and `index`, uint32 [B], the samples' places in the training stream, if something is drawn: with
        scale dropout, the entropy term or augmentation.
      learning_rate, weight_decay: of this step.
      discriminator_rate: learning rate of the discriminator.
      fixed: weights that the losses need.
    """
    options, adversary = recipe.options, recipe.adversary
    before, trained = state, recipe.trained(state.params)
    loss, parts, grads, generated = gradients(recipe, state, batch, trained, fixed)
    B = batch["image"].shape[0]
    hits_ema_SV = average_hits(options, state, jnp.round(parts["hits"] * B))  # whole numbers again
    extra, measured = state.extra, {}
    checked = loss
    if adversary is not None and generated is not None:
        checked = checked_loss(generated, grads)
        moved, measured = train_discriminator(
            adversary, recipe.optimizer, extra["adversary"], generated, discriminator_rate, weight_decay, checked
        )
        extra = {**extra, "adversary": moved}
    moving = state.replace(params=trained, ema=state.ema and recipe.trained(state.ema))
    state, metrics = apply_gradients(recipe.optimizer, moving, grads, learning_rate, weight_decay, loss=checked)
    hits_ema_SV = jnp.where(metrics["is_bad"], extra["hits"], hits_ema_SV)
    state = state.replace(
        params=before.params | state.params,
        ema=before.ema and before.ema | state.ema,
        extra={**extra, "hits": hits_ema_SV},
    )
    logged = {"quantizer_loss", "entropy_loss"}
    if adversary is not None or options.perceptual_weight:
        logged = parts.keys() - {"mse", "hits"}
    measured |= {name: x for name, x in parts.items() if name in logged}
    measured |= {"psnr_db": psnr_of_error(parts["mse"], 2), **describe_usage(hits_ema_SV, B, recipe.model.sides)}
    return state, {"loss": loss, **measured, **metrics}


def describe_usage(hits_ema_SV: jax.Array, batch_size: int, sides: tuple[int, ...]) -> dict[str, jax.Array]:
    """Return what a moving average of hits says of the codes, `[S]` each; batch_size over all devices.

    `usage_per_scale`: percentage of codes with 0.08 B h w / V hits a step, the published margin of all scales, by
    which a scale of n tokens has at most n / (0.08 h w) of them; `own_usage_per_scale`: with 0.08 B n / V hits;
    `perplexity_per_scale`.
    """
    areas_S = np.asarray(areas_of(sides))
    return {
        "usage_per_scale": usage_percent(hits_ema_SV, batch_size * sides[-1] ** 2),
        "own_usage_per_scale": usage_percent(hits_ema_SV, batch_size * areas_S),
        "perplexity_per_scale": perplexities(hits_ema_SV),
    }


def evaluate_batch(model: Tokenizer, params, batch: dict, fixed: FixedWeights | None = None):
    """Return (sums over real rows of each image's measures by name, hits [S, V], number of real rows).

    SSIM needs images as large as its window, LPIPS the weights of the training loss in `fixed`.
    """
    images = as_images(batch["image"])
    rec, _, encoded = model.apply({"params": params}, images)
    rec = jnp.clip(rec, -1, 1)
    error_B = jnp.mean(jnp.square(rec - images), axis=(1, 2, 3))
    measures = {"loss": error_B, "psnr_db": psnr_of_error(error_B, 2)}
    if min(images.shape[1:3]) >= SSIM_WINDOW:
        measures["ssim"] = similarity(rec, images, 2)
    if fixed is not None and fixed.perceptual is not None:
        measures["lpips"] = Lpips().apply({"params": fixed.perceptual}, *map(repeat_grey, (rec, images)))
    mask = batch["mask"]
    V = model.vocab_size
    # a padding row's ids fall outside the codebook and are not counted
    ids_BL = jnp.where(mask[:, None] > 0, encoded.ids_BL, V)
    hits_SV = count_hits(ids_BL, model.sides, V + 1)[:, :V]
    return {name: sum_rows(mask, x_B) for name, x_B in measures.items()}, hits_SV, jnp.sum(mask)
