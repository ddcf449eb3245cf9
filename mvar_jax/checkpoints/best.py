"""Which checkpoint is the best by a metric of the evaluations, beside the newest ones that are kept anyway."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_atomically

SCORE_FILE = "scores.json"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the evaluation and whether more of it is better. "loss" and "psnr_db:max" are written so."""

    name: str
    is_more_better: bool

    @classmethod
    def parse(cls, text: str) -> "Metric | None":
        """None for "". Raises InputError for another direction than min or max."""
        name, _, direction = text.partition(":")
        if direction not in ("", "min", "max") or (direction and not name):
            raise InputError("keep_best", text, "the name of a metric, as loss, or with a direction, as psnr_db:max")
        return cls(name, direction == "max") if name else None

    def score(self, metrics: dict) -> float:
        """More is better. Raises InputError where the evaluation has no such number."""
        value = metrics.get(self.name)
        if not isinstance(value, int | float):
            numbers = ", ".join(name for name, value in metrics.items() if isinstance(value, int | float))
            raise InputError("keep_best", self.name, f"one of {numbers}, the numbers of an evaluation")
        return value if self.is_more_better else -value


class Scores(PreservationPolicy):
    """Scores of the evaluated steps, in `checkpoints/scores.json`; as an Orbax policy it keeps the best step.

    Where the score of a step was written but its checkpoint never finished, the best of those that exist counts.
    """

    def __init__(self, folder: Path):
        self._path = folder / SCORE_FILE
        try:
            self._score_of_step = {int(step): score for step, score in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            self._score_of_step = {}

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The step with the highest score, of equal ones the first."""
        scored = [step for step in sorted(steps) if step in self._score_of_step]
        return max(scored, key=self._score_of_step.__getitem__, default=None)

    def is_best(self, score: float, steps: Sequence[int]) -> bool:
        """Whether a score beats those of all these steps."""
        best = self.best_of(steps)
        return math.isfinite(score) and (best is None or score > self._score_of_step[best])

    def add(self, step: int, score: float, steps: Sequence[int]) -> None:
        """Notes a step's score; forgets those of steps that are gone."""
        kept = {old: self._score_of_step[old] for old in steps if old in self._score_of_step}
        self._score_of_step = kept | {step: score}
        if jax.process_index() == 0:
            write_atomically(self._path, json.dumps(self._score_of_step) + "\n")

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best = self.best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def best_step(workdir: str | os.PathLike) -> int | None:
    """The best checkpoint of a run that kept one, to be passed to `restore_weights`; None where there is none."""
    folder = Path(workdir) / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return Scores(folder).best_of(steps)
