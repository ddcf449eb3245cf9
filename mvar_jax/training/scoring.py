"""Scores of the images that a model draws in an evaluation."""

import abc
from collections import deque
from collections.abc import Iterable

import jax
import numpy as np

from mvar_jax.processes import group

Scored = Iterable[tuple[np.ndarray, np.ndarray]]
IMAGES_PER_SHARD = 32  # drawn at once by the devices that share a row of the mesh


class Scorer(abc.ABC):
    """A judge of samples or reconstructions.

    Attributes:
      names: of the scores, for `keep_best`.
    """

    names: tuple[str, ...]

    @abc.abstractmethod
    def score(self, batches: Scored) -> dict[str, float]:
        """Return the scores of all images by name.

        batches: (pixels `[n, Y, X, 3] uint8`, what they show: the labels `[n]` of samples, or the originals of
        reconstructions, pixels of the same shape).
        """


def score_together(scorer: Scorer, batches: Scored) -> dict[str, float]:
    """Return the scores in every process. All of them draw the batches together, and the first one scores them."""
    scores = None
    if jax.process_index() == 0:
        scores = scorer.score(batches)
    else:
        deque(batches, maxlen=0)
    return group.current().gather("the scores of an evaluation", scores)[0]


def short_number(num: int) -> str:
    """Write 5000 as 5k and 500 as 500, as in "FID-5k"."""
    return f"{num // 1000}k" if num % 1000 == 0 else str(num)
