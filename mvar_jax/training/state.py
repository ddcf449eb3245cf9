"""The state of a run. It has no random key: randomness is a function of (seed, sample index)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mvar_jax.sharding import Named, shardings_of
from mvar_jax.training.optimizer import OptimizerOptions, make_adam


@flax.struct.dataclass
class TrainState:
    """The state of a run: step int32, params float32, ema like params or None, opt_state of optax, a task's extra."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    extra: Any


def make_state(
    init_boxed, options: OptimizerOptions, extra: dict | None = None, trained: Callable[[dict], dict] = lambda x: x
) -> TrainState:
    """Return a boxed state at step 0, in which moments and EMA carry the parameters' logical axes.

    trained: takes the parameters that the optimizer trains out of all of them; the others have no moments.
    """
    params = init_boxed()
    # a copy: two leaves must not share a buffer once the step donates its state
    ema = jax.tree.map(jnp.copy, params) if options.ema_decay else None
    moving = trained(nn.meta.unbox(params))
    opt_state = make_adam(options, moving).init(moving)
    axes = jax.tree.map(
        lambda leaf: leaf.names if isinstance(leaf, Named) else None,
        params,
        is_leaf=lambda x: isinstance(x, Named),
    )
    return TrainState(jnp.zeros((), jnp.int32), params, ema, _box_like(opt_state, axes), extra or {})


def _box_like(opt_state, axes):
    """Box every moment whose path ends in a parameter's path with that parameter's axes."""
    flat = {
        tuple(k.key for k in path): names
        for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    }

    def box(path, leaf):
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        for begin in range(len(keys)):
            if keys[begin:] in flat and flat[keys[begin:]] is not None:
                return Named(leaf, names=flat[keys[begin:]])
        return leaf

    return jax.tree_util.tree_map_with_path(box, opt_state)


@jax.jit
def all_finite(state) -> jax.Array:
    """Return whether every number of a tree is finite, as one bool that all processes hold."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def init_sharded(make_boxed_state, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """Return (state created sharded on the mesh, the same as ShapeDtypeStructs with shardings)."""
    abstract = abstract_sharded(make_boxed_state, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(lambda: nn.meta.unbox(make_boxed_state()), out_shardings=shardings)()
    return state, abstract


def abstract_sharded(make_boxed_state, mesh: Mesh) -> TrainState:
    """Return the state's shapes with their shardings; nothing is allocated."""
    boxed = jax.eval_shape(make_boxed_state)
    shardings = shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )
