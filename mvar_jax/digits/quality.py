"""Figures of a set of sampled digits: what the judge recognises, Frechet distances, spread, and copies."""

import math
from typing import NamedTuple

import numpy as np

from mvar_jax.digits import judge
from mvar_jax.evaluation import statistics


class Real(NamedTuple):
    """The real images of a run, `[N, Y, X, 3]` uint8 or float in [-1, 1], not augmented, with their labels."""

    train: np.ndarray
    train_labels: np.ndarray
    heldout: np.ndarray
    heldout_labels: np.ndarray


class Samples(NamedTuple):
    """Samples `[N, Y, X, 3]` with their labels `[N]` and token ids `[N, L]`."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


class Judges:
    """The classifier and the feature spaces of a run, fitted to its training images.

    Attributes:
      real: the run's images.
      spaces: feature spaces by the prefix of their Frechet distances.
    """

    def __init__(self, real: Real):
        grid_NG = judge.reduce_to_grid(real.train)
        self.real, self._classifier = real, judge.train_judge(grid_NG, real.train_labels)
        self.spaces = {
            "fd": judge.hidden_layer_space(grid_NG, real.train_labels),
            "fd_pca": judge.principal_space(grid_NG),
        }

    def accuracy(self, images, labels) -> float:
        """Return the share of images that the classifier assigns to their label."""
        return judge.class_accuracy(self._classifier, images, labels)

    def distances(self, name: str, images) -> dict[str, float]:
        """Return the Frechet distances of images to the held-out ones, as `PREFIX_name`."""
        real = self.real.heldout
        return {
            f"{prefix}_{name}": statistics.frechet_distance(space(images), space(real))
            for prefix, space in self.spaces.items()
        }

    def measure(self, samples: Samples) -> dict:
        """Return the figures of samples.

        nearest_*: distances on the 8 x 8 grid to the nearest training image. within_class_spread: `class_variance` of
        samples over that of held-out images.
        """
        train_NG, (images, labels, ids) = judge.reduce_to_grid(self.real.train), samples
        nearest = lambda images: statistics.nearest_distances(judge.reduce_to_grid(images), train_NG)
        of_samples, of_heldout = (float(np.median(nearest(x))) for x in (images, self.real.heldout))
        spread, real_spread = (class_variance(*x) for x in ((images, labels), self.real[2:]))
        return {
            "judge_sample_accuracy": self.accuracy(images, labels),
            **self.distances("samples", images),
            "within_class_spread": spread / real_spread,
            "nearest_distance_samples": of_samples,
            "nearest_distance_heldout": of_heldout,
            "nearest_ratio": of_samples / of_heldout if of_heldout else math.inf,
            "num_samples": len(images),
            "num_distinct_pyramids": len(np.unique(np.asarray(ids), axis=0)),
        }


def class_variance(images_BYX3, labels_B) -> float:
    """Return the variance of images about the mean of their class, summed over the 8 x 8 grid."""
    grid_BG, labels_B = judge.reduce_to_grid(images_BYX3), np.asarray(labels_B)
    parts = [grid_BG[labels_B == number] for number in np.unique(labels_B)]
    squares = sum(float(((part_NG - part_NG.mean(0)) ** 2).sum()) for part_NG in parts)
    return squares / max(1, len(grid_BG) - len(parts))
