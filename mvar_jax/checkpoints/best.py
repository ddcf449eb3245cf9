"""The best checkpoint by a metric of the evaluations, kept in addition to the newest ones."""

import dataclasses
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypedDict

from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from mvar_jax.checkpoints.steps import checkpoint_folder, list_steps
from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.json_files import read_json
from mvar_jax.schema import conform

SCORE_FILE = "scores.json"
# what the names of such metrics contain
MORE_IS_BETTER = ("psnr", "ssim", "accuracy", "codebook_used", "inception_score")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the evaluation and whether more of it is better, written as "loss", "psnr_db" or "my_score:max"."""

    name: str
    is_more_better: bool

    @classmethod
    def parse(cls, text: str) -> "Metric | None":
        """Return the metric, None for "". Raises InputError for a direction other than min or max.

        Without a direction, the name decides: more is better if it contains one of MORE_IS_BETTER.
        """
        name, _, direction = text.partition(":")
        if direction not in ("", "min", "max") or (direction and not name):
            expected = "the name of a metric such as loss, or with a direction such as my_score:max"
            words = f"config.keep_best must be {expected}, got {text!r}"
            raise InputError(words, field="config.keep_best", given=text, expected=expected)
        is_more_better = direction == "max" or (not direction and any(part in name for part in MORE_IS_BETTER))
        return cls(name, is_more_better) if name else None

    def describe(self, settings: dict[str, Any]) -> str:
        """Return the metric with its direction and the settings of an evaluation as one text."""
        words = [f"{self.name}:{'max' if self.is_more_better else 'min'}"]
        return " ".join([*words, *(f"{name}={value}" for name, value in settings.items())])

    def check(self, known: Collection[str]) -> None:
        """Raise InputError unless the evaluation has a number of this name. known: its numbers."""
        if self.name not in known:
            expected = ", ".join(known)
            words = f"config.keep_best must be a number of the evaluation, one of {expected}, got {self.name!r}"
            raise InputError(words, field="config.keep_best", given=self.name, expected=expected)

    def score(self, metrics: dict) -> float:
        """Return the score of an evaluation; more is better. Raises InputError if it has no such number."""
        self.check([name for name, value in metrics.items() if isinstance(value, int | float)])
        return metrics[self.name] if self.is_more_better else -metrics[self.name]


class Scores(PreservationPolicy):
    """Scores of the evaluated steps, in `checkpoints/scores.json`; as an Orbax policy it keeps the best step.

    A score counts only while its checkpoint exists.

    Args:
      folder: of the checkpoints.
      score_of_step: what was measured.
      measured_by: the metric and the settings of the evaluations, None if they are not known.
    """

    def __init__(self, folder: Path, score_of_step: dict[int, float], measured_by: str | None = None):
        self._path, self._score_of_step, self._measured_by = folder / SCORE_FILE, score_of_step, measured_by

    def measure_by(self, measured_by: str) -> str | None:
        """Forget scores that were not measured by this, and return what they were measured by, else None."""
        others = self._measured_by if self._measured_by not in (None, measured_by) and self._score_of_step else None
        if others is not None:
            self._score_of_step = {}
        self._measured_by = measured_by
        return others

    def best_of(self, steps: Sequence[int]) -> int | None:
        """Return the step with the highest score, the first of equal ones."""
        scored = [step for step in sorted(steps) if step in self._score_of_step]
        return max(scored, key=self._score_of_step.__getitem__, default=None)

    def is_best(self, score: float, steps: Sequence[int]) -> bool:
        """Return whether a score beats those of all these steps."""
        best = self.best_of(steps)
        return math.isfinite(score) and (best is None or score > self._score_of_step[best])

    def add(self, step: int, score: float, steps: Sequence[int]) -> None:
        """Note a step's score; forget those of steps that no longer exist."""
        kept = {old: self._score_of_step[old] for old in steps if old in self._score_of_step}
        self._score_of_step = kept | {step: score}

    def forget_after(self, step: int) -> bool:
        """Forget the scores of later steps, whose checkpoints will be others; return whether there were any."""
        kept = {old: score for old, score in self._score_of_step.items() if old <= step}
        has_changed = kept != self._score_of_step
        self._score_of_step = kept
        return has_changed

    def write(self) -> None:
        """Write the scores: one process does."""
        content = {"measured_by": self._measured_by, "scores": self._score_of_step}
        write_atomically(self._path, json.dumps(content) + "\n")

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return for each checkpoint whether it is the best."""
        best = self.best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


class _ScoreFile(TypedDict):
    measured_by: str | None
    scores: dict[str, float]


def read_scores(folder: Path) -> tuple[dict[int, float], str | None]:
    """Return (step -> score, what they were measured by) of a folder of checkpoints.

    Empty if there are none or they are unreadable. Version 0.1.0 wrote steps and scores alone.
    """
    try:
        content = read_json(folder / SCORE_FILE, dict[str, Any])
        file = conform(content if "scores" in content else {"measured_by": None, "scores": content}, _ScoreFile, "")
        return {int(step): score for step, score in file["scores"].items()}, file["measured_by"]
    except (OSError, ValueError):
        return {}, None


def best_step(workdir: str | os.PathLike) -> int | None:
    """Return the step of a run's best checkpoint, None if no evaluation was scored."""
    folder = checkpoint_folder(workdir)
    return Scores(folder, *read_scores(folder)).best_of(list_steps(folder))
