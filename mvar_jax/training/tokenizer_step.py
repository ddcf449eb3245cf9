"""Steps of the tokenizer: losses, updates, and redrawing of unused codes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.ops.metrics import psnr_of_error
from mvar_jax.ops.pixels import as_images
from mvar_jax.scales import areas_of, offsets_of
from mvar_jax.schema import Decay, Natural, NotNegative
from mvar_jax.training.accumulate import value_and_grad_over_parts
from mvar_jax.training.adversary import Adversary, FixedWeights
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import TrainState
from mvar_jax.training.tokenizer_losses import (
    Judge,
    PixelWeights,
    adversarial_gradients,
    apply_training,
    checked_loss,
    draw_passes,
    pixel_loss,
    train_discriminator,
)

MIN_PERCEPTUAL_SIDE = 48  # pixels


@dataclasses.dataclass(frozen=True)
class CodebookOptions:
    """Options of the tokenizer's losses and codebook (docs/method.md, Training).

    Attributes:
      warmup_steps: first steps without quantization; at their end the codebook is drawn from residuals.
      revive_every_steps: steps between replacements of unused codes; 0 replaces none.
      revive_until_step: last step at which unused codes are replaced.
      revive_below: hits a step (moving average) below which a code counts as unused.
      l1_weight: weight of the mean absolute error of the reconstruction.
      l2_weight: weight of the mean squared error of the reconstruction.
      perceptual_weight: weight of LPIPS between the reconstruction and the image; 0 needs no weights.
      perceptual_file: weights of LPIPS, as `convert --lpips` writes them.
      usage_decay: decay of the moving average of a code's hits.
      usage_decay_early: the same in the first usage_early_steps after the warm-up.
      usage_early_steps: number of those steps.

    Raises InputError for values out of range.
    """

    warmup_steps: Natural = 0
    revive_every_steps: Natural = 0
    revive_until_step: Natural = 0
    revive_below: NotNegative = 0.1
    l1_weight: NotNegative = 0.0
    l2_weight: NotNegative = 1.0
    perceptual_weight: NotNegative = 0.0
    perceptual_file: str = dataclasses.field(default="", metadata=FREE)
    usage_decay: Decay = 0.99
    usage_decay_early: Decay = 0.9
    usage_early_steps: Natural = 100

    def __post_init__(self):
        check_fields(self, "config.codebook")
        if self.l1_weight + self.l2_weight == 0:
            words = "config.codebook.l2_weight must be above 0 if config.codebook.l1_weight is 0, got 0 for both"
            raise InputError(words, field="config.codebook.l2_weight", given=0, expected="above 0")

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError if LPIPS cannot judge images `[Y, X, C]`: VGG leaves little of small ones."""
        if self.perceptual_weight and (min(image_shape[:2]) < MIN_PERCEPTUAL_SIDE or image_shape[2] != 3):
            expected = f"0 unless images have at least {MIN_PERCEPTUAL_SIDE} x {MIN_PERCEPTUAL_SIDE} x 3 values"
            given = " x ".join(map(str, image_shape))
            words = f"config.codebook.perceptual_weight must be {expected}, got {self.perceptual_weight} for {given}"
            field = "config.codebook.perceptual_weight"
            raise InputError(words, field=field, given=self.perceptual_weight, expected=expected)

    @property
    def last_redraw(self) -> int:
        """Return the last step at which codes may be redrawn."""
        return max(self.warmup_steps, self.revive_until_step if self.revive_every_steps else 0)

    @property
    def pixel_weights(self) -> PixelWeights:
        """Return the weights of the losses of a reconstruction's pixels."""
        return PixelWeights(self.l1_weight, self.l2_weight, self.perceptual_weight)

    def is_redraw_due(self, step: int) -> bool:
        """Return whether codes are redrawn before iteration `step`."""
        if step == self.warmup_steps and self.warmup_steps:
            return True
        due = self.revive_every_steps and step % self.revive_every_steps == 0
        return bool(due and self.warmup_steps < step <= self.revive_until_step)


def count_hits(ids_BL: jax.Array, sides: tuple[int, ...], vocab_size: int) -> jax.Array:
    """Return float32 [S, V]: how often each scale of the batch chose each code."""
    spans = itertools.pairwise(offsets_of(areas_of(sides)))
    return jnp.stack(
        [jnp.bincount(ids_BL[:, a:b].reshape(-1), length=vocab_size).astype(jnp.float32) for a, b in spans]
    )


def usage_percent(hits_ema_SV: jax.Array, batch_size: int, latent_area: int) -> jax.Array:
    """Return [S]: percentage of codes whose moving average reaches 0.08 * B*h*w / V; B over all devices."""
    V = hits_ema_SV.shape[-1]
    return 100 * jnp.mean(hits_ema_SV >= 0.08 * batch_size * latent_area / V, axis=-1)


def forward(model: Tokenizer, params, rows: dict, use_codes):
    """Return ((reconstruction, quantizer loss), (input of the decoder's last convolution, parts)).

    parts, means over the batch: `quantizer_loss`, `hits` [S, V] per image.
    """
    images = rows["image"]
    (rec, quantizer_loss, encoded), features = apply_training(model, params, images, use_codes)
    hits_SV = count_hits(encoded.ids_BL, model.sides, model.vocab_size) / images.shape[0]
    return (rec, quantizer_loss), (features, {"quantizer_loss": quantizer_loss, "hits": hits_SV})


def tokenizer_loss(model: Tokenizer, options: CodebookOptions, params, rows: dict, use_codes, fixed=FixedWeights()):  # noqa: B008
    """Return (loss, parts): the losses of the raw reconstruction's pixels plus the quantizer's loss.

    parts: those of `forward` and `pixel_loss`.
    """
    (rec, quantizer_loss), (_, parts) = forward(model, params, rows, use_codes)
    loss, of_pixels = pixel_loss(options.pixel_weights, fixed, rec, rows["image"])
    return loss + quantizer_loss, parts | of_pixels


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """The constants of all steps of a run: hashable, so static in a compiled step.

    num_parts: equal parts of a batch whose gradients are accumulated. seed: of the augmentation of what the
    discriminator sees. adversary: of the steps that have one.
    """

    model: Tokenizer
    optimizer: OptimizerOptions
    options: CodebookOptions
    num_parts: int = 1
    seed: int = 0
    adversary: Adversary | None = None


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
      batch: `image`, and with augmentation `index`, uint32 [B], the samples' places in the training stream.
      learning_rate, weight_decay: of this step.
      discriminator_rate: learning rate of the discriminator.
      fixed: weights that the losses need.
    """
    model, options, adversary = recipe.model, recipe.options, recipe.adversary
    use_codes = state.step >= options.warmup_steps
    rows = {"image": as_images(batch["image"])}
    generated = None
    if adversary is None:
        loss_fn = lambda params, part: tokenizer_loss(model, options, params, part, use_codes, fixed)
        (loss, parts), grads = value_and_grad_over_parts(loss_fn, state.params, rows, recipe.num_parts)
    else:
        if adversary.options.augment:
            rows["draws"] = draw_passes(recipe.seed, batch["index"], state.step)
        last, part = state.params["decoder"]["conv_out"], state.extra["adversary"]
        generated = adversarial_gradients(
            lambda params, part: forward(model, params, part, use_codes),
            state.params,
            rows,
            recipe.num_parts,
            Judge(model, options.pixel_weights, adversary, fixed, last, part),
            adversary.options.weight_at(state.step),
        )
        loss, parts, grads = generated.loss, generated.parts, generated.grads
    if options.warmup_steps:  # nothing may move the codebook before the codes are drawn
        frozen = {"codebook": jnp.where(use_codes, grads["codebook"], 0.0)}
        grads = {**grads, **frozen}
    B = batch["image"].shape[0]
    hits_SV = jnp.round(parts["hits"] * B)  # whole numbers again
    is_early = state.step < options.warmup_steps + options.usage_early_steps
    decay = jnp.where(is_early, options.usage_decay_early, options.usage_decay)
    hits_ema_SV = decay * state.extra["hits"] + (1 - decay) * hits_SV
    extra, measured = state.extra, {}
    checked = loss
    if adversary is not None and generated is not None:
        checked = checked_loss(generated, grads)
        moved, measured = train_discriminator(
            adversary, recipe.optimizer, extra["adversary"], generated, discriminator_rate, weight_decay, checked
        )
        extra = {**extra, "adversary": moved}
    state, metrics = apply_gradients(recipe.optimizer, state, grads, learning_rate, weight_decay, loss=checked)
    hits_ema_SV = jnp.where(metrics["is_bad"], extra["hits"], hits_ema_SV)
    state = state.replace(extra={**extra, "hits": hits_ema_SV})
    usage_S = usage_percent(hits_ema_SV, B, model.sides[-1] ** 2)
    measured |= {"psnr_db": psnr_of_error(parts["mse"], 2), "quantizer_loss": parts["quantizer_loss"]}
    if adversary is not None or options.perceptual_weight:
        measured |= {name: x for name, x in parts.items() if name not in ("mse", "hits")}
    return state, {"loss": loss, **measured, "usage_per_scale": usage_S, **metrics}


def redraw_codes(model: Tokenizer, options: CodebookOptions, state: TrainState, batch: dict, key: jax.Array):
    """Replace unused codes (all of them at the end of the warm-up) by residual vectors of this batch.

    Coarser scales are likelier to give the vector: tokens of one scale are drawn independently, so an image's global
    content must fit into few of them. The codebook's EMA and moments are replaced too, or they would pull a new code
    back to the old place.
    """
    is_first = state.step == options.warmup_steps
    images = as_images(batch["image"])
    encoded = model.apply({"params": state.params}, images, method=lambda m, x: m.quantize(m.features(x)))
    V = model.vocab_size
    pools = [rest.reshape(-1, rest.shape[-1]) for rest in encoded.rests]
    keys = jax.random.split(key, len(pools) + 1)
    picks = jnp.stack(
        [pool[jax.random.randint(k, (V,), 0, pool.shape[0])] for pool, k in zip(pools, keys[1:], strict=True)]
    )
    weights_S = jnp.arange(len(pools), 0, -1, dtype=jnp.float32)
    scale_V = jax.random.categorical(keys[0], jnp.log(weights_S), shape=(V,))
    drawn_Vc = picks[scale_V, jnp.arange(V)]
    is_dead_V = (jnp.sum(state.extra["hits"], axis=0) < options.revive_below) | is_first
    is_dead_V &= jnp.isfinite(drawn_Vc).all(axis=1)  # features that are not finite must not poison the codebook
    dead = is_dead_V[:, None]

    def replace(path, leaf, fresh):
        # every moment and copy of the codebook has its path's last key
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return jnp.where(dead, fresh, leaf) if keys and keys[-1] == "codebook" else leaf

    def with_codes(tree, fresh):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: replace(path, leaf, fresh), tree)

    # hits for one step, or a new code would count as unused at once
    grace_SV = jnp.where(is_dead_V[None], options.revive_below, state.extra["hits"])
    return state.replace(
        params=with_codes(state.params, drawn_Vc),
        ema=None if state.ema is None else with_codes(state.ema, drawn_Vc),
        opt_state=with_codes(state.opt_state, jnp.zeros_like(drawn_Vc)),
        extra={**state.extra, "hits": grace_SV},
    )
