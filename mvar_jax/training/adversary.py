"""The adversary of a tokenizer: its options, its schedule and its part of a run's state."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.ops.adversarial import LogitMeans
from mvar_jax.schema import Choice, Count, Decay, Layers, Natural, NotNegative
from mvar_jax.sharding import check_sizes
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import TrainState, make_state
from mvar_jax.training.task import RunOptions

NONE, PATCH, DINO = KINDS = ("none", "patch", "dino")


@dataclasses.dataclass(frozen=True)
class AdversaryOptions:
    """Options of the discriminator and of the adversarial loss (docs/method.md, Training).

    Attributes:
      kind: none, patch (convolutions over patches) or dino (heads over a frozen DINO ViT-S/16).
      file: weights of DINO, as `convert --dino` writes them (dino).
      weight: weight of the adversarial loss, times the adaptive weight.
      adaptive: weigh the adversarial loss by the ratio of both gradients at the decoder's last kernel; False: by 1.
      start_step: first step at which the discriminator trains and counts; before, it costs nothing.
      ramp_steps: steps over which the adversarial loss grows to its weight, from start_step on.
      warmup_steps: steps over which the discriminator's learning rate grows to its own, from start_step on.
      rate_factor: learning rate of the discriminator, relative to the tokenizer's at the same step.
      beta1: decay of the first moment of the discriminator's gradient.
      beta2: decay of the second moment.
      lecam_weight: weight of LeCam regularisation in the discriminator's loss.
      lecam_decay: decay of the moving means of the logits that it compares with.
      augment: shift, recolour and cut what the discriminator sees, real images and reconstructions alike.
      layers: convolutions of stride 2; a patch is 70 pixels wide with 3, 34 with 2, 16 with 1 (patch).
      width: channels of the first convolution (patch).

    Raises InputError for values out of range.
    """

    kind: Annotated[str, Choice(KINDS)] = NONE
    file: str = dataclasses.field(default="", metadata=FREE)
    weight: NotNegative = 0.4
    adaptive: bool = True
    start_step: Natural = 0
    ramp_steps: Natural = 0
    warmup_steps: Natural = 0
    rate_factor: NotNegative = 1.0
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    lecam_weight: NotNegative = 0.001
    lecam_decay: Decay = 0.999
    augment: bool = True
    layers: Layers = 3
    width: Count = 64

    def __post_init__(self):
        check_fields(self, "config.adversary")

    def check_start(self, num_steps: int, last_redraw: int) -> None:
        """Raise InputError if the discriminator starts after the run's end, or while codes are still redrawn.

        A redrawn code is another image to the decoder, and the discriminator would learn that.
        """
        expected = None
        if self.start_step >= num_steps:
            expected = f"below config.num_steps={num_steps}"
        elif last_redraw and self.start_step <= last_redraw:
            expected = f"above {last_redraw}, the last step at which codes may be redrawn"
        if expected is not None:
            words = f"config.adversary.start_step must be {expected}, got {self.start_step}"
            raise InputError(words, field="config.adversary.start_step", given=self.start_step, expected=expected)

    def weight_at(self, step: jax.Array) -> jax.Array:
        """Return the weight of the adversarial loss at a step from start_step on."""
        return self.weight * jnp.clip((step - self.start_step + 1) / max(self.ramp_steps, 1), 0, 1)

    def rate_at(self, step: int, learning_rate: Any) -> Any:
        """Return the discriminator's learning rate at a step from start_step on. learning_rate: the tokenizer's."""
        warmup = min(1.0, (step - self.start_step + 1) / max(self.warmup_steps, 1))
        return type(learning_rate)(learning_rate * self.rate_factor * warmup)

    def optimizer(self, options: OptimizerOptions) -> OptimizerOptions:
        """Return the discriminator's AdamW: the tokenizer's with its own betas, without an average."""
        return dataclasses.replace(options, beta1=self.beta1, beta2=self.beta2, ema_decay=0.0, ema_ramp=False)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator and its options: hashable, so static in a compiled step."""

    options: AdversaryOptions
    network: nn.Module

    def check(self, run: RunOptions, image_shape: tuple[int, int, int], last_redraw: int) -> None:
        """Raise InputError if run, images, mesh or the last redrawing of codes do not fit."""
        self.options.check_start(run.num_steps, last_redraw)
        self.network.check(image_shape)  # type: ignore[attr-defined]  # of every discriminator
        check_sizes(self.network.mesh_sizes(), run.mesh)  # type: ignore[attr-defined]

    def init_state(self, optimizer: OptimizerOptions, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
        """Return the discriminator's part of the state, each array boxed with its logical axes.

        `params`, `opt_state`, `step` (its own updates), `spectral` and `means` of its logits.
        """
        variables = self.network.init_variables(key, image_shape)  # type: ignore[attr-defined]  # of every discriminator
        state = make_state(lambda: variables["params"], self.options.optimizer(optimizer))
        means = LogitMeans.zeros()
        return {
            "params": state.params,
            "opt_state": state.opt_state,
            "step": state.step,
            "spectral": variables["spectral"],
            "means": {"real": means.real, "fake": means.fake},
        }


def train_state(part: dict) -> TrainState:
    """Return the discriminator's part of a state as `apply_gradients` takes it."""
    return TrainState(part["step"], part["params"], None, part["opt_state"], {})


@flax.struct.dataclass
class FixedWeights:
    """Weights that losses need and no step changes; None for those of networks that are not used.

    Attributes:
      perceptual: of LPIPS.
      discriminator: the frozen part of a discriminator.
    """

    perceptual: Any = None
    discriminator: Any = None
