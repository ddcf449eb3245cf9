import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.sampling.order import Order, spread_labels
from mvar_jax.sampling.sampler import SampleOptions


@pytest.mark.parametrize(
    ("num", "labels"),
    [(2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (7, [0, 1, 2, 3, 4, 0, 2]), (10, [0, 1, 2, 3, 4] * 2)],
)
def test_samples_that_fill_no_round_are_spread_over_the_labels(num, labels):
    assert spread_labels(5, num).tolist() == labels


def test_samples_of_a_total_are_some_of_those_of_the_whole_rounds():
    """A sample keeps its number, so its noise, whether or not the last round is whole."""
    labels = (4, 5, 8)
    whole, part = Order(labels, 3, SampleOptions()), Order.of_total(labels, 8, SampleOptions())
    rows = [0, 1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(part.numbers_N, whole.numbers_N[rows])
    np.testing.assert_array_equal(part.labels_N, [4, 5, 8, 4, 5, 8, 4, 5])
    few = Order.of_total(tuple(range(100)), 4, SampleOptions())
    assert few.labels_N.tolist() == few.numbers_N.tolist() == [0, 25, 50, 75]
    all_rounds = Order.of_total(labels, 9, SampleOptions())
    np.testing.assert_array_equal(all_rounds.numbers_N, whole.numbers_N)


def test_a_total_of_other_rounds_is_refused():
    with pytest.raises(InputError, match="total must be from 4 to 6, got 7"):
        Order((0, 1, 2), 2, SampleOptions(), total=7)
