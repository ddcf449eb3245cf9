import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.random import keys_of_samples


def data(seed, index_B):
    return np.asarray(jax.random.key_data(keys_of_samples(seed, index_B)))


def test_keys_are_a_function_of_seed_and_index():
    np.testing.assert_array_equal(data(0, [5, 1, 7])[[2, 0]], data(0, [7, 5]))
    assert len(np.unique(data(0, np.arange(100)), axis=0)) == 100
    assert (data(0, [5]) != data(1, [5])).any()


def test_key_is_the_seed_with_the_index_folded_in():
    """Samples of a seed and a resumed run stay what they were only while this holds, up to the largest index."""
    for index in (0, 3, 2**32 - 1):
        expected = jax.random.key_data(jax.random.fold_in(jax.random.key(3), np.uint32(index)))
        np.testing.assert_array_equal(data(3, np.asarray([index]))[0], expected)


def test_traced_indices_give_the_same_keys():
    index_B = np.arange(4, dtype=np.uint32)
    traced = jax.jit(lambda i: jax.random.key_data(keys_of_samples(3, i)))(jnp.asarray(index_B))
    np.testing.assert_array_equal(traced, data(3, index_B))
