"""The judge of digits that a training run draws."""

import pytest

from mvar_jax.digits import judge
from mvar_jax.digits.scorer import DigitScorer
from mvar_jax.digits.splits import load_splits
from mvar_jax.errors import InputError


def test_the_judge_prefers_real_digits_and_right_labels(monkeypatch):
    """Held-out digits are recognised and near themselves; with other labels, or as negatives, they are not.

    In a feature space that is fitted at once; test_judge.py has the other one.
    """
    monkeypatch.setattr(judge, "hidden_layer_space", lambda grid_NG, labels: judge.principal_space(grid_NG))
    scorer = DigitScorer(8, 0, 0.2, 360)
    assert scorer.names == ("fd_360", "judge_accuracy")
    pixels, labels = load_splits(8, 0, 0.2)["val"]
    halves = lambda x, y: [(x[:200], y[:200]), (x[200:], y[200:])]
    real = scorer.score(halves(pixels, labels))
    assert real["fd_360"] == pytest.approx(0, abs=1e-6) and real["judge_accuracy"] > 0.97
    assert scorer.score(halves(pixels, labels)) == real
    assert scorer.score(halves(pixels, (labels + 1) % 10))["judge_accuracy"] < 0.03
    assert scorer.score(halves(255 - pixels, labels))["fd_360"] > 1


def test_images_that_the_judge_cannot_reduce_are_refused():
    with pytest.raises(InputError, match="config.data.image_size must be a multiple of 8, .* got 12") as caught:
        DigitScorer(12, 0, 0.2, 100)
    assert caught.value.field == "config.data.image_size"
