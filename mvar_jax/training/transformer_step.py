"""Steps of the transformer: the paper's schedule of phases (MVAR section 3.3) and the joint one."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from mvar_jax.fields import check_fields
from mvar_jax.models.transformer import Transformer, previous_of
from mvar_jax.ops.losses import sum_per_scale, sum_rows, token_cross_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.scales import Phase, phase_of
from mvar_jax.schema import Choice, Count, Decay
from mvar_jax.training.accumulate import value_and_grad_over_parts
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class PhaseOptions:
    """Options of the transformer's training (docs/method.md, Training).

    Attributes:
      schedule: paper (each step trains one phase) or joint (each step trains every phase of the same batch).
      ratio: steps of the coarse phase in a cycle of the paper schedule; each window phase gets one.
      label_drop_rate: share of samples that train the "no class" row, which guidance needs.
      label_smoothing: weight of the uniform part of the cross-entropy.

    Raises InputError for values out of range.
    """

    schedule: Annotated[str, Choice(("paper", "joint"))] = "paper"
    ratio: Count = 8
    label_drop_rate: Decay = 0.1
    label_smoothing: Decay = 0.0

    def __post_init__(self):
        check_fields(self, "config.phases")

    def phases_of_step(self, model: Transformer, step: int) -> tuple[Phase, ...]:
        """Return the phases that iteration `step` trains."""
        return self.due(model.phases(), step)

    def cycle(self, num_phases: int) -> int:
        """Return the number of steps after which the phases repeat."""
        return 1 if self.schedule == "joint" else self.ratio + num_phases - 1

    def due(self, phases: tuple[Phase, ...], step: int) -> tuple[Phase, ...]:
        """Return those of the phases that iteration `step` trains."""
        return phases if self.schedule == "joint" else (phases[phase_of(step, len(phases), self.ratio)],)


def phase_loss(model, params, batch: dict, phase: Phase, label_smoothing: float = 0.0):
    """Return (loss, (nll, hits)): the mean over the batch of 1/L a token, and sums over each scale, [B, scales].

    batch: `ids` int32 [B, L], `label` int32 [B], `previous` float32 [B, L - n_0, c] and in training the drop-path
    factors `path` [depth, 2, B].
    """
    pyramid = model.pyramid
    previous = previous_of(batch["previous"], phase, pyramid.areas[0])
    logits_BNV, _ = model.apply({"params": params}, previous, batch["label"], phase, batch.get("path"))
    ids_BN = batch["ids"][:, phase.begin : phase.end]
    sums = token_sums(logits_BNV, ids_BN, pyramid.areas[phase.first : phase.last + 1], label_smoothing)
    return jnp.mean(jnp.sum(sums[0], axis=1)) / pyramid.num_tokens, sums


def token_sums(logits_BNV, ids_BN, areas: tuple[int, ...], label_smoothing: float = 0.0):
    """Return (cross-entropy, hits) of logits, summed over the tokens of each map, `[B, scales]` each."""
    cross_entropy_BN = token_cross_entropy(logits_BNV, ids_BN, label_smoothing)
    hits_BN = (jnp.argmax(logits_BNV, axis=-1) == ids_BN).astype(jnp.float32)
    return sum_per_scale(cross_entropy_BN, areas), sum_per_scale(hits_BN, areas)


def drop_labels(labels_B, keys_B, rate: float, no_class: int) -> jax.Array:
    """Return the labels, each replaced by `no_class` with probability `rate`."""
    draws_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys_B)
    return jnp.where(draws_B < rate, no_class, labels_B)


def draw_paths(model: Transformer, keys_B) -> jax.Array | None:
    """Return drop-path factors [depth, 2, B]: 0 drops a branch, 1 / keep keeps it; None without drop-path."""
    if model.drop_path_rate == 0:
        return None
    keep_D = 1 - jnp.asarray(model.drop_path_rates())
    draws_BD2 = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (model.depth, 2)))(keys_B)
    return jnp.transpose((draws_BD2 < keep_D[:, None]) / keep_D[:, None], (1, 2, 0))


@dataclasses.dataclass(frozen=True)
class TransformerRecipe:
    """The constants of all steps of a run: hashable, so static in a compiled step.

    seed: of label dropout and drop-path. num_parts: equal parts of a batch whose gradients are accumulated.
    """

    model: Transformer
    optimizer: OptimizerOptions
    options: PhaseOptions
    seed: int = 0
    num_parts: int = 1


def train_step(
    recipe: TransformerRecipe,
    phases: tuple[Phase, ...],
    state: TrainState,
    batch: dict,
    learning_rate: jax.Array,
    weight_decay: jax.Array,
):
    """Take one optimizer step over `phases`, gradients accumulated phase by phase; return (state, metrics).

    Jit with the first two arguments static. Metrics hold NaN for scales outside `phases`.

    Args:
      recipe: constants of the run.
      phases: the phases to train.
      state: the TrainState.
      batch: `ids` int32 [B, L]; `label` int32 [B]; `previous` float32 [B, L - n_0, c], the teacher-forcing input of
        the ids; `index` uint32 [B], the samples' places in the training stream.
      learning_rate, weight_decay: of this step.
    """
    model, options = recipe.model, recipe.options
    keys_B = keys_of_samples(recipe.seed, batch["index"])
    batch = {
        "ids": batch["ids"],
        "label": drop_labels(batch["label"], keys_B, options.label_drop_rate, model.num_classes),
        "previous": batch["previous"],
        "path": draw_paths(model, keys_B),
    }
    total_loss, total_grads = 0.0, None
    nan_S = jnp.full((model.pyramid.num_scales,), jnp.nan)
    nll_S, hits_S = nan_S, nan_S
    areas = jnp.asarray(model.pyramid.areas, jnp.float32)
    for phase in phases:

        def mean_loss(params, part, phase=phase):
            loss, sums = phase_loss(model, params, part, phase, options.label_smoothing)
            return loss, jax.tree.map(lambda x_BS: x_BS.mean(0), sums)

        (loss, (nll_s, hits_s)), grads = value_and_grad_over_parts(mean_loss, state.params, batch, recipe.num_parts)
        total_loss += loss
        total_grads = grads if total_grads is None else jax.tree.map(jnp.add, total_grads, grads)
        cut = slice(phase.first, phase.last + 1)
        nll_S = nll_S.at[cut].set(nll_s / areas[cut])
        hits_S = hits_S.at[cut].set(hits_s / areas[cut])
    trains_start = any(phase.trains_start for phase in phases)
    state, metrics = apply_gradients(
        recipe.optimizer, state, total_grads, learning_rate, weight_decay, trains_start, total_loss
    )
    return state, {"loss": total_loss, "loss_per_scale": nll_S, "accuracy_per_scale": hits_S, **metrics}


def eval_step(model: Transformer, params, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return sums over the batch's real rows, without dropout: (nll [S], hits [S], rows).

    batch: that of `train_step` without `index` and with `mask` float32 [B], 1 for real rows.
    """
    parts = [phase_loss(model, params, batch, phase)[1] for phase in model.phases()]
    nll_BS, hits_BS = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    mask = batch["mask"]
    return sum_rows(mask, nll_BS), sum_rows(mask, hits_BS), jnp.sum(mask)
