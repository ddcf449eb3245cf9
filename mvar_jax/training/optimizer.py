"""AdamW with clipping as the published program applies it (docs/method.md, Training), on optax's Adam."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.schema import Decay, Natural, NotNegative, Positive, Share
from mvar_jax.training.schedules import check_schedule, learning_rate_factor, weight_decay_at

UNDECAYED = ("bias", "q_bias", "v_bias", "scale", "log_scale", "pos_start", "pos_embed", "level_embed")
UNDECAYED += ("adaptive_offset", "codebook", "codebook_map", "outside")
FIXED = ("codebook_basis",)  # parameters that no step moves, nor rounding in their average


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of AdamW and its schedules (docs/method.md, Training).

    Attributes:
      base_learning_rate: peak learning rate for a batch of 256; the peak is this times batch_size / 256.
      schedule: shape after the warm-up: cos, lin, lin0, lin00, exp, or lin<T> such as lin0.3.
      warmup_steps: steps of linear growth from warmup_factor to the peak.
      warmup_epochs: the same in passes over the training images, instead of warmup_steps.
      warmup_factor: learning rate of the first step, relative to the peak.
      final_factor: learning rate of the last step, relative to the peak.
      weight_decay: decoupled weight decay of the matrices.
      final_weight_decay: weight decay of the last step, reached along a cosine; None keeps it constant.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
      clip_norm: largest global norm of a gradient; 0 does not clip.
      ema_decay: decay of the moving average of the weights, which evaluation and sampling then use; 0 keeps none.
      ema_ramp: whether the decay of step i is at most (i / 2 + 1) / (i / 2 + 10), so that a long average forgets the
        initial weights early.

    Raises InputError for values out of range.
    """

    base_learning_rate: NotNegative = 1e-4
    schedule: str = "lin0"
    warmup_steps: Natural = 0
    warmup_epochs: NotNegative = dataclasses.field(default=0.0, metadata=FREE)  # a run is compared by its steps
    warmup_factor: Share = 0.005
    final_factor: Share = 0.1
    weight_decay: NotNegative = 0.05
    final_weight_decay: NotNegative | None = None
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    clip_norm: NotNegative = 2.0
    ema_decay: Decay = 0.0
    ema_ramp: bool = False

    def __post_init__(self):
        check_fields(self, "config.optimizer")
        check_schedule(self.schedule)
        if self.schedule == "exp" and not self.final_factor:
            words = (
                "config.optimizer.final_factor must be above 0 with config.optimizer.schedule=exp, whose learning "
            )
            words += "rate would be 0 at once, got 0; choose lin for a rate that falls to 0"
            raise InputError(words, field="config.optimizer.final_factor", given=0.0, expected="above 0")
        if self.ema_ramp and not self.ema_decay:
            words = "config.optimizer.ema_ramp must be False with config.optimizer.ema_decay=0, got True"
            raise InputError(words, field="config.optimizer.ema_ramp", given=True, expected="False")
        if self.warmup_steps and self.warmup_epochs:
            both = f"{self.warmup_steps} and {self.warmup_epochs}"
            words = "only one of config.optimizer.warmup_steps and config.optimizer.warmup_epochs may be above 0, "
            words += f"got {both}; set the other to 0"
            raise InputError(
                words, field="config.optimizer.warmup_epochs", given=both, expected="one of them to be 0"
            )

    def with_steps(self, steps_per_epoch: int) -> "OptimizerOptions":
        """Return the options with warmup_epochs turned into warmup_steps."""
        if not self.warmup_epochs:
            return self
        return dataclasses.replace(self, warmup_steps=round(self.warmup_epochs * steps_per_epoch), warmup_epochs=0.0)

    def ema_decay_at(self, step: jax.Array | int) -> jax.Array | float:
        """Return the decay of the average of the weights in iteration `step`."""
        return jnp.minimum(self.ema_decay, (step / 2 + 1) / (step / 2 + 10)) if self.ema_ramp else self.ema_decay

    def at(self, step: int, num_steps: int, batch_size: int) -> tuple[float, float]:
        """Return (learning rate, weight decay) of iteration `step`."""
        factor = learning_rate_factor(
            self.schedule, step, num_steps, self.warmup_steps, self.warmup_factor, self.final_factor
        )
        last = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        decay = weight_decay_at(step, num_steps, self.weight_decay, last)
        return self.base_learning_rate * batch_size / 256 * factor, decay


def path_name(path: tuple) -> str:
    """Return the last key of a parameter's path."""
    return path[-1].key


def decay_mask(params) -> dict:
    """Return which parameters decay: matrices, not biases, norms, per-head scales, positions, embeddings, codes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) not in UNDECAYED, params)


def make_adam(options: OptimizerOptions, params) -> optax.GradientTransformation:
    """Return Adam; the start position has moments of its own, which window phases leave alone."""
    adam = lambda: optax.scale_by_adam(options.beta1, options.beta2, options.eps)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "start" if path_name(path) == "pos_start" else "rest", params
    )
    return optax.partition({"start": adam(), "rest": adam()}, labels)


def clip_by_norm(grads, clip_norm: float):
    """Return (grads * min(1, clip_norm / (norm + 1e-6)), norm before clipping); clip_norm 0 is off."""
    norm = optax.tree.norm(grads)
    if clip_norm == 0:
        return grads, norm
    factor = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), norm


def apply_gradients(
    options: OptimizerOptions, state, grads, learning_rate, weight_decay, trains_start: bool = True, loss=0.0
):
    """Take one AdamW step with decoupled decay; return (state, metrics grad_norm and is_bad).

    Args:
      options: of the optimizer.
      state: the TrainState.
      grads: gradients, a tree like the parameters.
      learning_rate, weight_decay: of this step.
      trains_start: False leaves the start position and its moments alone.
      loss: of this step.

    A non-finite gradient or loss changes nothing in the state except its step, and sets is_bad.
    """
    grads, norm = clip_by_norm(grads, options.clip_norm)
    updates, opt_state = make_adam(options, state.params).update(grads, state.opt_state, state.params)
    if not trains_start:
        inner = {**opt_state.inner_states, "start": state.opt_state.inner_states["start"]}
        opt_state = opt_state._replace(inner_states=inner)

    def move(path, param, update, is_decayed):
        if path_name(path) in FIXED or (path_name(path) == "pos_start" and not trains_start):
            return param
        decayed = param * (1 - learning_rate * weight_decay) if is_decayed else param
        return decayed - learning_rate * update

    params = jax.tree_util.tree_map_with_path(move, state.params, updates, decay_mask(state.params))
    ema = state.ema
    if ema is not None:
        decay = options.ema_decay_at(state.step)
        average = lambda e, p: decay * e + (1 - decay) * p
        keep_or_average = lambda path, e, p: e if path_name(path) in FIXED else average(e, p)
        ema = jax.tree_util.tree_map_with_path(keep_or_average, ema, params)
    is_good = jnp.isfinite(norm) & jnp.isfinite(loss)
    moved = (params, ema, opt_state)
    kept = (state.params, state.ema, state.opt_state)
    params, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), moved, kept)
    state = state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
    return state, {"grad_norm": norm, "is_bad": 1 - is_good.astype(jnp.int32)}
