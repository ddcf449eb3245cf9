"""Options of the training loop."""

import dataclasses
from typing import Annotated

from mvar_jax.checkpoints.best import Metric
from mvar_jax.fields import FREE, check_fields
from mvar_jax.schema import Count, Natural, Range
from mvar_jax.training.profiling import check_profile_steps


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
      keep_best: evaluation metric whose best checkpoint is kept too, such as loss, psnr_db or fid_1k; more is better
        for psnr, ssim, accuracy, codebook_used and inception_score, else less, unless :max or :min follows; "" keeps
        none.
      profile_steps: (first, end) of the steps that the profiler records into WORKDIR/profile; () records none.

    Raises InputError for values out of range.
    """

    num_steps: Natural
    log_every_steps: Count = dataclasses.field(metadata=FREE)
    eval_every_steps: Natural = dataclasses.field(metadata=FREE)
    picture_every_steps: Annotated[int, Range(least=-1)] = dataclasses.field(metadata=FREE)
    save_every_steps: Natural = dataclasses.field(metadata=FREE)
    keep_checkpoints: Count = dataclasses.field(metadata=FREE)
    max_bad_steps: Count = dataclasses.field(metadata=FREE)
    keep_best: str = dataclasses.field(default="", metadata=FREE)
    profile_steps: tuple[int, ...] = dataclasses.field(default=(), metadata=FREE)

    def __post_init__(self):
        check_fields(self, "config")
        Metric.parse(self.keep_best)
        check_profile_steps(self.profile_steps, self.num_steps)
