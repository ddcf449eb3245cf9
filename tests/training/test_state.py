import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from small_case import MODEL

from mvar_jax.sharding import make_mesh, named_axes
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import abstract_sharded, init_sharded, make_state

WITH_EMA = OptimizerOptions(ema_decay=0.9)


def test_moments_and_average_carry_the_parameters_axes():
    state = jax.eval_shape(lambda: make_state(lambda: MODEL.init_params(jax.random.key(0)), WITH_EMA))
    is_box = lambda x: isinstance(x, nn.Partitioned)
    names_of = lambda tree: [box.names for box in jax.tree.leaves(tree, is_leaf=is_box) if is_box(box)]
    names = names_of(state.params)
    assert ("tokens", "width") in names and len(names) == 17  # the biases of plain linears have none
    assert names_of(state.ema) == names
    # two moments of every parameter, the start position's in a state of its own
    assert sorted(map(str, names_of(state.opt_state))) == sorted(map(str, 2 * names))
    for box in jax.tree.leaves(state.opt_state, is_leaf=is_box):
        assert not is_box(box) or len(box.names) == len(box.value.shape)


def test_sharded_state_is_created_as_announced():
    def make_boxed():
        make_kernel = named_axes(nn.initializers.normal(), "width", "heads")
        params = lambda: {"kernel": make_kernel(jax.random.key(0), (4, 2)), "pos_start": jnp.ones((1, 4))}
        return make_state(params, WITH_EMA, {"hits": jnp.zeros((2, 3))})

    mesh = make_mesh(devices=jax.devices()[:1])
    state, abstract = init_sharded(make_boxed, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, announced in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (announced.shape, announced.dtype, announced.sharding)
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert jax.tree.structure(abstract_sharded(make_boxed, mesh)) == jax.tree.structure(abstract)


def test_average_starts_as_a_copy():
    """A donated state must not hold one buffer twice."""
    state = make_state(lambda: {"bias": jnp.ones(3)}, WITH_EMA)
    assert state.ema["bias"].unsafe_buffer_pointer() != state.params["bias"].unsafe_buffer_pointer()


def test_no_average_is_kept_where_it_is_off():
    state = make_state(lambda: {"bias": jnp.ones(3)}, OptimizerOptions())
    assert state.ema is None and state.extra == {}
