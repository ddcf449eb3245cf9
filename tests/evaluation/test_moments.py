import functools

import eval_case
import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.evaluation import moments
from mvar_jax.evaluation.moments import Moments, RunningMoments


def parts_of(x_ND, sizes):
    return np.split(x_ND, np.cumsum(sizes)[:-1])


def assert_moments(found: Moments, mean_D, covariance_DD):
    np.testing.assert_allclose(found.mean_D, mean_D, rtol=1e-13, atol=1e-13 * np.abs(mean_D).max())
    np.testing.assert_allclose(found.covariance_DD, covariance_DD, atol=1e-13 * np.abs(covariance_DD).max())


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 2, 1)])
def test_merged_parts_have_the_moments_of_the_whole_set(order):
    golden = eval_case.load("merge.npz")
    parts = parts_of(golden["x"], golden["parts"])
    merged = functools.reduce(Moments.merge, [Moments.of(parts[i]) for i in order if len(parts[i])])
    assert merged.count == len(golden["x"])
    assert_moments(merged, golden["mu"], golden["sigma"])


def test_streamed_rows_have_the_moments_of_the_whole_set_in_chunks_of_any_size(monkeypatch):
    golden = eval_case.load("merge.npz")
    for chunk in (7, 100, 4096):
        monkeypatch.setattr(moments, "CHUNK_ROWS", chunk)
        running = RunningMoments()
        for part in np.array_split(golden["x"], 90):
            running.add(part)
        assert_moments(running.moments(), golden["mu"], golden["sigma"])
        assert_moments(Moments.of(golden["x"]), golden["mu"], golden["sigma"])


def test_a_mean_far_from_zero_costs_no_accuracy():
    """E[xx] - E[x]E[x] would lose twelve digits here."""
    x_ND = np.random.default_rng(0).normal(size=(500, 4))
    far = functools.reduce(Moments.merge, map(Moments.of, np.array_split(x_ND + 1e6, 5)))
    np.testing.assert_allclose(far.covariance_DD, np.cov(x_ND, rowvar=False), rtol=1e-8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(value):
    x_ND = np.zeros((5000, 3), np.float32)
    x_ND[4321, 1] = value
    with pytest.raises(InputError, match="^features must be finite, got NaN or infinity in row 4321 of 5000$"):
        Moments.of(x_ND)


def test_no_rows_and_one_row_are_refused():
    with pytest.raises(InputError, match=r"^features must be numbers \[N, D\] with at least 1 row, got "):
        Moments.of(np.zeros((0, 3)))
    with pytest.raises(InputError, match="^features must have at least 1 row, got none$"):
        RunningMoments().moments()
    with pytest.raises(InputError, match="^features must have at least 2 rows for a covariance, got 1$"):
        print(Moments.of(np.zeros((1, 3))).covariance_DD)
