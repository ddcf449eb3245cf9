"""Steps of the refiner: cross-entropy on the hidden states of a frozen transformer (docs/method.md, Refiner)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.models.networks import Networks
from mvar_jax.models.refined import phase_hidden, phase_logits, refined_logits
from mvar_jax.ops.losses import sum_rows
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.scales import Phase
from mvar_jax.training.accumulate import value_and_grad_over_parts
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients
from mvar_jax.training.state import TrainState
from mvar_jax.training.transformer_step import PhaseOptions, drop_labels, token_sums


@dataclasses.dataclass(frozen=True)
class RefinerRecipe:
    """The constants of all steps of a run; as `TransformerRecipe`."""

    optimizer: OptimizerOptions
    options: PhaseOptions
    seed: int = 0
    num_parts: int = 1


def refined_phases(networks: Networks) -> tuple[Phase, ...]:
    """Return the transformer's phases that hold a refined scale."""
    return tuple(phase for phase in networks.transformer.phases() if networks.refined_scales(phase))


def train_step(
    recipe: RefinerRecipe,
    phases: tuple[Phase, ...],
    base: Networks,
    state: TrainState,
    batch: dict,
    learning_rate: jax.Array,
    weight_decay: jax.Array,
):
    """Take one optimizer step over the refined scales of `phases`; return (state, metrics).

    The loss is the mean over the tokens of all refined scales. The transformer sees no dropout but that of labels.
    Metrics hold NaN for other scales.

    Args:
      recipe, phases: static, see `transformer_step.train_step`.
      base: the frozen networks, with the module of the refiner; its weights are those of the state.
      state, batch, learning_rate, weight_decay: see `transformer_step.train_step`.
    """
    pyramid, options = base.transformer.pyramid, recipe.options
    keys_B = keys_of_samples(recipe.seed, batch["index"])
    labels_B = drop_labels(batch["label"], keys_B, options.label_drop_rate, base.transformer.num_classes)
    hidden = {str(phase.first): phase_hidden(base, batch["previous"], labels_B, phase) for phase in phases}
    num_refined = sum(pyramid.areas[scale] for phase in refined_phases(base) for scale in base.refined_scales(phase))
    scales = np.concatenate([base.refined_scales(phase) for phase in phases])
    areas = tuple(pyramid.areas[scale] for scale in scales)

    def mean_loss(params, part):
        logits, ids = [], []
        for phase in phases:
            logits.append(refined_logits(base, params, part[str(phase.first)], part["ids"], phase))
            ids += [part["ids"][:, slice(*pyramid.offsets[s : s + 2])] for s in base.refined_scales(phase)]
        sums = token_sums(jnp.concatenate(logits, 1), jnp.concatenate(ids, 1), areas, options.label_smoothing)
        return jnp.mean(jnp.sum(sums[0], axis=1)) / num_refined, jax.tree.map(lambda x_BS: x_BS.mean(0), sums)

    parts = {"ids": batch["ids"], **jax.lax.stop_gradient(hidden)}
    (loss, sums), grads = value_and_grad_over_parts(mean_loss, state.params, parts, recipe.num_parts)
    spread = lambda sum_s: jnp.full((pyramid.num_scales,), jnp.nan).at[scales].set(sum_s / jnp.asarray(areas))
    nll_S, hits_S = map(spread, sums)
    state, metrics = apply_gradients(recipe.optimizer, state, grads, learning_rate, weight_decay, loss=loss)
    return state, {"loss": loss, "loss_per_scale": nll_S, "accuracy_per_scale": hits_S, **metrics}


def eval_step(networks: Networks, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return sums over the batch's real rows: (nll [S], hits [S], rows), see `transformer_step.eval_step`.

    Scales that are not refined count with the transformer's logits.
    """
    pyramid, parts = networks.transformer.pyramid, []
    for phase in networks.transformer.phases():
        logits = phase_logits(networks, batch["previous"], batch["ids"], batch["label"], phase)
        areas = pyramid.areas[phase.first : phase.last + 1]
        parts.append(token_sums(logits, batch["ids"][:, phase.begin : phase.end], areas))
    nll_BS, hits_BS = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    mask = batch["mask"]
    return sum_rows(mask, nll_BS), sum_rows(mask, hits_BS), jnp.sum(mask)
