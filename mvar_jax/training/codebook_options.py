"""Options of a tokenizer's losses and codebook."""

import dataclasses

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.schema import Count, Decay, Natural, NotNegative, Positive, Share
from mvar_jax.training.tokenizer_losses import PixelWeights

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
      simvq: the codebook is E W, with fixed normal E `[V, c]` and learned W `[c, c]`, so codes move together (SimVQ);
        exported as an ordinary codebook. At the end of the warm-up W gives the codes the residuals' second moments.
      entropy_weight: weight of the tokens' entropy less that of their mean, which asks for all codes to be used.
      entropy_until_step: step at which that weight, which falls linearly from the first step on, has reached 0.
      entropy_temperature: divisor of the squared distances in a token's soft assignment.
      scale_dropout: share of rows that keep their first k scales alone, k uniform from scale_dropout_first to all.
      scale_dropout_first: least number of scales that are kept.

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
    simvq: bool = False
    entropy_weight: NotNegative = 0.0
    entropy_until_step: Natural = 0
    entropy_temperature: Positive = 0.01
    scale_dropout: Share = 0.0
    scale_dropout_first: Count = 3

    def __post_init__(self):
        check_fields(self, "config.codebook")
        if self.l1_weight + self.l2_weight == 0:
            words = "config.codebook.l2_weight must be above 0 if config.codebook.l1_weight is 0, got 0 for both"
            raise InputError(words, field="config.codebook.l2_weight", given=0, expected="above 0")
        if self.simvq and self.revive_every_steps:
            words = f"config.codebook.revive_every_steps must be 0 with simvq, got {self.revive_every_steps}: "
            words += "a code of E W cannot be replaced alone"
            raise InputError(
                words, field="config.codebook.revive_every_steps", given=self.revive_every_steps, expected="0"
            )
        if self.revive_every_steps and not self.revive_until_step:
            words = (
                "config.codebook.revive_every_steps must be 0 if revive_until_step is 0, which replaces no codes, "
            )
            words += f"got {self.revive_every_steps}; give revive_until_step too"
            field = "config.codebook.revive_every_steps"
            raise InputError(words, field=field, given=self.revive_every_steps, expected="0")
        if self.entropy_weight and self.entropy_until_step <= self.warmup_steps:
            expected = f"above warmup_steps={self.warmup_steps} if entropy_weight is above 0"
            words = f"config.codebook.entropy_until_step must be {expected}, got {self.entropy_until_step}"
            raise InputError(
                words, field="config.codebook.entropy_until_step", given=self.entropy_until_step, expected=expected
            )

    def check_steps(self, num_steps: int) -> None:
        """Raise InputError if the run ends before the codebook is drawn from residuals. num_steps: of the run."""
        if self.warmup_steps >= num_steps:
            field, expected = "config.codebook.warmup_steps", f"below config.num_steps={num_steps}"
            words = f"{field} must be {expected}, got {self.warmup_steps}: the codebook would stay random"
            raise InputError(words, field=field, given=self.warmup_steps, expected=expected)

    def check_scales(self, num_scales: int) -> None:
        """Raise InputError if scale dropout keeps more scales than there are."""
        if self.scale_dropout and self.scale_dropout_first > num_scales:
            expected = f"at most {num_scales}, the number of scales"
            words = f"config.codebook.scale_dropout_first must be {expected}, got {self.scale_dropout_first}"
            raise InputError(
                words,
                field="config.codebook.scale_dropout_first",
                given=self.scale_dropout_first,
                expected=expected,
            )

    def entropy_weight_at(self, step: jax.Array) -> jax.Array:
        """Return the weight of the entropy term at a step, 0 in the warm-up."""
        share = jnp.clip(1 - step / max(self.entropy_until_step, 1), 0, 1)
        return jnp.where(step < self.warmup_steps, 0, self.entropy_weight * share)

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError if LPIPS cannot judge images `[Y, X, C]`: VGG leaves little of small ones."""
        if self.perceptual_weight and (min(image_shape[:2]) < MIN_PERCEPTUAL_SIDE or image_shape[2] == 4):
            expected = f"0 unless images have at least {MIN_PERCEPTUAL_SIDE} pixels a side and no alpha"
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
