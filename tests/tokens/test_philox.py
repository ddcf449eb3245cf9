import numpy as np
import pytest

from mvar_jax.tokens.philox import first_draws_below, first_words

INDEX = np.concatenate([np.arange(300), 2**40 + np.arange(50)])


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_first_words_are_numpys(seed):
    expected = [np.random.Philox(key=[seed, int(index)]).random_raw() for index in INDEX]
    assert np.array_equal(first_words(seed, INDEX), np.array(expected, np.uint64))


@pytest.mark.parametrize("bound", [1, 2, 3, 8, 1000, 3 * 2**30])  # the last draws again a quarter of the time
def test_first_draws_are_numpys(bound):
    expected = [np.random.Generator(np.random.Philox(key=[7, int(index)])).integers(bound) for index in INDEX]
    assert np.array_equal(first_draws_below(bound, 7, INDEX), expected)
