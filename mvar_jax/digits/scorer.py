"""Scores of the digits that a transformer in training draws, by the quickstart's judges."""

import functools

import numpy as np

from mvar_jax.digits import judge
from mvar_jax.digits.splits import load_splits
from mvar_jax.errors import InputError
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.reference import Gaussian
from mvar_jax.evaluation.statistics import frechet_distance_of_moments
from mvar_jax.training.scoring import Scored, Scorer, short_number


class DigitScorer(Scorer):
    """Frechet distance to the held-out digits, as `fd_samples` of the report, and the share of recognised samples.

    Args:
      image_size, split_seed, val_fraction: those of the run's data.
      num: samples that are scored; the distance depends on it and has it in its name.

    Raises InputError unless the image side is a multiple of the judge's grid.
    """

    def __init__(self, image_size: int, split_seed: int, val_fraction: float, num: int):
        if image_size % judge.GRID_SIDE:
            expected = f"a multiple of {judge.GRID_SIDE}, as the judge of digits needs"
            message = f"config.data.image_size must be {expected}, got {image_size}"
            raise InputError(message, field="config.data.image_size", given=image_size, expected=expected)
        self.names = (f"fd_{short_number(num)}", "judge_accuracy")
        self._data = image_size, split_seed, val_fraction

    @functools.cached_property
    def _judges(self) -> tuple:
        """Return (classifier, feature space, statistics of the held-out images in it)."""
        splits = load_splits(*self._data)
        train, labels = splits["train"]
        grid_NG = judge.reduce_to_grid(train)
        space = judge.hidden_layer_space(grid_NG, labels)
        return judge.train_judge(grid_NG, labels), space, Gaussian.of(Moments.of(space(splits["val"][0])))

    def score(self, batches: Scored) -> dict[str, float]:
        """Return the distance and the share."""
        pixels, labels = map(np.concatenate, zip(*batches, strict=True))
        classifier, space, heldout = self._judges
        distance = frechet_distance_of_moments(*Gaussian.of(Moments.of(space(pixels))), *heldout)
        return dict(zip(self.names, (distance, judge.class_accuracy(classifier, pixels, labels)), strict=True))
