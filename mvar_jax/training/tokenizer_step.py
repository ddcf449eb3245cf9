"""Steps of the tokenizer: losses, updates, and redrawing of unused codes."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.fields import check_fields
from mvar_jax.models.tokenizer import Tokenizer, decoder_params
from mvar_jax.ops.metrics import psnr_of_error
from mvar_jax.ops.pixels import as_images
from mvar_jax.scales import areas_of, offsets_of
from mvar_jax.schema import Decay, Natural, NotNegative
from mvar_jax.training.accumulate import value_and_grad_over_parts
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import TrainState


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
    usage_decay: Decay = 0.99
    usage_decay_early: Decay = 0.9
    usage_early_steps: Natural = 100

    def __post_init__(self):
        check_fields(self, "config.codebook")
        if self.l1_weight + self.l2_weight == 0:
            words = "config.codebook.l2_weight must be above 0 if config.codebook.l1_weight is 0, got 0 for both"
            raise InputError(words, field="config.codebook.l2_weight", given=0, expected="above 0")

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


def tokenizer_loss(model: Tokenizer, options: CodebookOptions, params, images_BYX3, use_codes):
    """Return (loss, parts): weighted L1 and L2 of the raw reconstruction plus the quantizer's loss.

    parts, means over the batch: `mse` of the clipped reconstruction, `quantizer_loss`, `hits` [S, V] per image.
    """
    rec, quantizer_loss, encoded = model.apply({"params": params}, images_BYX3, use_codes)
    error = rec - images_BYX3
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    loss = options.l1_weight * l1 + options.l2_weight * l2 + quantizer_loss
    clipped = jnp.mean(jnp.square(jnp.clip(rec, -1, 1) - images_BYX3))
    hits_SV = count_hits(encoded.ids_BL, model.sides, model.vocab_size) / images_BYX3.shape[0]
    return loss, {"mse": clipped, "quantizer_loss": quantizer_loss, "hits": hits_SV}


TRAIN_PARTS: dict[str, Callable[[dict], dict]] = {"all": dict, "decoder": decoder_params}


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """The constants of all steps of a run: hashable, so static in a compiled step.

    num_parts: equal parts of a batch whose gradients are accumulated.
    train_parts: all, or decoder: the ids and all parameters that they depend on stay as they are.
    """

    model: Tokenizer
    optimizer: OptimizerOptions
    options: CodebookOptions
    num_parts: int = 1
    train_parts: str = "all"

    def trained(self, params: dict) -> dict:
        """Return the parameters that a step trains."""
        return TRAIN_PARTS[self.train_parts](params)


def train_step(
    recipe: TokenizerRecipe, state: TrainState, batch: dict, learning_rate: jax.Array, weight_decay: jax.Array
):
    """Take one optimizer step. Jit with the recipe static. `extra.hits` is the usage moving average [S, V]."""
    model, options = recipe.model, recipe.options
    use_codes = state.step >= options.warmup_steps
    before, trained = state, recipe.trained(state.params)
    # only what is trained is differentiated, so a frozen encoder has no backward pass
    loss_fn = lambda part_of, part: tokenizer_loss(model, options, before.params | part_of, part["image"], use_codes)
    images = {"image": as_images(batch["image"])}
    (loss, parts), grads = value_and_grad_over_parts(loss_fn, trained, images, recipe.num_parts)
    if options.warmup_steps:  # nothing may move the codebook before the codes are drawn
        frozen = {"codebook": jnp.where(use_codes, grads["codebook"], 0.0)}
        grads = {**grads, **frozen}
    B = batch["image"].shape[0]
    hits_SV = jnp.round(parts["hits"] * B)  # whole numbers again
    is_early = state.step < options.warmup_steps + options.usage_early_steps
    decay = jnp.where(is_early, options.usage_decay_early, options.usage_decay)
    hits_ema_SV = decay * state.extra["hits"] + (1 - decay) * hits_SV
    hits_before_SV = state.extra["hits"]
    moving = state.replace(params=trained, ema=None if state.ema is None else recipe.trained(state.ema))
    moved, metrics = apply_gradients(recipe.optimizer, moving, grads, learning_rate, weight_decay, loss=loss)
    state = moved.replace(
        params=before.params | moved.params, ema=None if before.ema is None else before.ema | moved.ema
    )
    hits_ema_SV = jnp.where(metrics["is_bad"], hits_before_SV, hits_ema_SV)
    state = state.replace(extra={**before.extra, "hits": hits_ema_SV})
    usage_S = usage_percent(hits_ema_SV, B, model.sides[-1] ** 2)
    measured = {"psnr_db": psnr_of_error(parts["mse"], 2), "quantizer_loss": parts["quantizer_loss"]}
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
