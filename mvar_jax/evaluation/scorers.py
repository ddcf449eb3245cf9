"""Scores of the images that a model in training draws: FID and inception score, or FID of reconstructions."""

import functools

import numpy as np

from mvar_jax.evaluation.class_score import inception_score
from mvar_jax.evaluation.features import FeatureExtractor
from mvar_jax.evaluation.inception import Features
from mvar_jax.evaluation.moments import RunningMoments
from mvar_jax.evaluation.reference import Gaussian, Reference
from mvar_jax.evaluation.statistics import frechet_distance_of_moments
from mvar_jax.training.scoring import Scored, Scorer, short_number


class SampleScorer(Scorer):
    """FID and inception score of samples, with their number in the names: both depend on it.

    reference: what FID compares with; of its images if it has no statistics.
    """

    def __init__(self, extractor: FeatureExtractor, reference: Reference, num: int):
        self.names = tuple(f"{name}_{short_number(num)}" for name in ("fid", "inception_score"))
        self._extractor, self._reference = extractor, reference

    @functools.cached_property
    def _target(self) -> Gaussian:
        images = self._reference.images
        if self._reference.pool is not None or images is None:
            assert self._reference.pool is not None, "a reference has one of both"
            return self._reference.pool
        running = RunningMoments()
        for features in self._extractor.stream(images.pieces(self._extractor.batch_size)):
            running.add(features.pool)
        return Gaussian.of(running.moments())

    def score(self, batches: Scored) -> dict[str, float]:
        """Return FID and inception score."""
        running, probabilities = RunningMoments(), []
        for pixels, _ in batches:
            features = features_of(self._extractor, pixels)
            running.add(features.pool)
            probabilities.append(features.probabilities)
        distance = frechet_distance_of_moments(*Gaussian.of(running.moments()), *self._target)
        return dict(zip(self.names, (distance, inception_score(np.concatenate(probabilities))), strict=True))


class ReconstructionScorer(Scorer):
    """FID between reconstructions and their originals, with the number of images in the name."""

    def __init__(self, extractor: FeatureExtractor, num: int):
        self.names = (f"rfid_{short_number(num)}",)
        self._extractor = extractor

    def score(self, batches: Scored) -> dict[str, float]:
        """Return the FID."""
        sets = RunningMoments(), RunningMoments()
        for pair in batches:
            for running, pixels in zip(sets, pair, strict=True):
                running.add(features_of(self._extractor, pixels).pool)
        ours, originals = (Gaussian.of(running.moments()) for running in sets)
        return {self.names[0]: frechet_distance_of_moments(*ours, *originals)}


def features_of(extractor: FeatureExtractor, pixels_NYX3: np.ndarray) -> Features:
    """Return the features of any number of images."""
    size = extractor.batch_size
    parts = extractor.stream(pixels_NYX3[begin : begin + size] for begin in range(0, len(pixels_NYX3), size))
    return Features(*map(np.concatenate, zip(*parts, strict=True)))
