"""Options of the training loop."""

import dataclasses

from mvar_jax.checkpoints.best import Metric
from mvar_jax.errors import InputError
from mvar_jax.fields import FREE
from mvar_jax.training.profiling import check_profile_steps

_LEAST = {"num_steps": 0, "eval_every_steps": 0, "save_every_steps": 0, "picture_every_steps": -1}  # 1 for the others


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Options of the training loop.

    Attributes:
      num_steps: optimizer steps of the whole run; 0 if they follow from epochs, as long as the data are not open.
      log_every_steps: steps between lines of metrics.jsonl.
      eval_every_steps: steps between evaluations; 0 evaluates only at the start and at the end.
      picture_every_steps: steps between image grids; 0 draws them only at the end, -1 never.
      save_every_steps: steps between checkpoints; 0 saves only at the end.
      keep_checkpoints: number of newest checkpoints to keep.
      max_bad_steps: steps in a row without a finite loss and gradient after which the run stops.
      keep_best: evaluation metric whose best checkpoint is kept too, as loss or psnr_db:max; "" keeps none.
      profile_steps: (first, end) of the steps that the profiler records into WORKDIR/profile; () records none.

    Raises InputError for values out of range.
    """

    num_steps: int
    log_every_steps: int = dataclasses.field(metadata=FREE)
    eval_every_steps: int = dataclasses.field(metadata=FREE)
    picture_every_steps: int = dataclasses.field(metadata=FREE)
    save_every_steps: int = dataclasses.field(metadata=FREE)
    keep_checkpoints: int = dataclasses.field(metadata=FREE)
    max_bad_steps: int = dataclasses.field(metadata=FREE)
    keep_best: str = dataclasses.field(default="", metadata=FREE)
    profile_steps: tuple[int, ...] = dataclasses.field(default=(), metadata=FREE)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is not int:
                continue
            value = getattr(self, field.name)
            least = _LEAST.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                words = f"config.{field.name} must be a whole number of at least {least}, got {value!r}"
                raise InputError(words, field=field.name, given=value, expected=f"{least} or more")
        Metric.parse(self.keep_best)
        check_profile_steps(self.profile_steps)
