"""Scores of the images that a model in training draws."""

import numpy as np
import pytest

from mvar_jax.evaluation.class_score import inception_score
from mvar_jax.evaluation.inception import Features
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.reference import Gaussian, ImageFile, Reference
from mvar_jax.evaluation.scorers import ReconstructionScorer, SampleScorer
from mvar_jax.evaluation.statistics import frechet_distance

RNG = np.random.default_rng(0)
PIXELS, OTHERS = (RNG.integers(low, 256, (23, 2, 2, 3), np.uint8) for low in (0, 60))
LABELS = np.arange(23)


class MeanColours:
    """In place of the network: three features, and three probabilities."""

    batch_size = 4

    def stream(self, batches):
        for pixels in batches:
            assert 0 < len(pixels) <= self.batch_size
            pool = pixels.mean((1, 2))
            yield Features(pool, pool, pool / pool.sum(1, keepdims=True))


def in_batches(*arrays):
    return list(zip(*(np.split(x, [10, 20]) for x in arrays), strict=True))


@pytest.fixture
def references(tmp_path):
    """The same reference by its statistics and by its images."""
    np.savez(tmp_path / "x.npz", arr_0=OTHERS)
    images = ImageFile.open("reference", tmp_path / "x.npz")
    pool = Gaussian.of(Moments.of(OTHERS.mean((1, 2))))
    return Reference(pool, None, None, {}), Reference(None, None, images, {})


def test_scores_of_batches_are_those_of_all_samples_and_say_how_many_there_were(references):
    pool = PIXELS.mean((1, 2))
    expected = {
        "fid_23": frechet_distance(pool, OTHERS.mean((1, 2))),
        "inception_score_23": inception_score(pool / pool.sum(1, keepdims=True)),
    }
    for reference in references:
        scorer = SampleScorer(MeanColours(), reference, 23)
        assert scorer.score(in_batches(PIXELS, LABELS)) == pytest.approx(expected, rel=1e-9)
        assert scorer.names == tuple(expected)


@pytest.mark.parametrize(("num", "name"), [(1000, "rfid_1k"), (50000, "rfid_50k"), (1500, "rfid_1500")])
def test_rfid_is_between_reconstructions_and_their_originals(num, name):
    scorer = ReconstructionScorer(MeanColours(), num)
    assert scorer.names == (name,)
    assert scorer.score(in_batches(PIXELS, PIXELS))[name] == pytest.approx(0, abs=1e-6)
    expected = frechet_distance(PIXELS.mean((1, 2)), OTHERS.mean((1, 2)))
    assert scorer.score(in_batches(PIXELS, OTHERS))[name] == pytest.approx(expected, rel=1e-9)
    assert expected > 100


def test_a_resumed_run_scores_alike(references):
    first, second = (SampleScorer(MeanColours(), references[1], 23) for _ in range(2))
    batches = in_batches(PIXELS, LABELS)
    assert first.score(batches) == first.score(batches) == second.score(batches)
