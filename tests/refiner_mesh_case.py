"""A refiner's steps and its samples on one device and on eight virtual ones: prints losses, ids and shards."""

import functools
import json
import math

import jax
import numpy as np
from mesh_case import AUTOENCODER, OPTIMIZER, PHASES, TRANSFORMER, run
from small_case import seeded_batch, seeded_params

from mvar_jax.models.networks import Networks
from mvar_jax.models.refiner import Refiner
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.bulk import place_networks
from mvar_jax.sampling.sampler import SampleOptions, sample
from mvar_jax.sharding import make_mesh, put_batch, use_mesh
from mvar_jax.training import refiner_step
from mvar_jax.training.state import abstract_sharded, make_state

REFINER = Refiner((3, 6), vocab_size=24, code_width=4, width=40, num_heads=8, depth=1)


def refiner_report() -> dict:
    """Return the losses of a refiner's steps and the ids of its samples, on one device and on the mixed mesh."""
    modules = {"tokenizer": AUTOENCODER, "transformer": TRANSFORMER, "refiner": REFINER}
    networks = Networks.of(modules, {kind: seeded_params(module, std=0.3) for kind, module in modules.items()})
    recipe = refiner_step.RefinerRecipe(OPTIMIZER, PHASES)
    step = functools.partial(refiner_step.train_step, recipe, TRANSFORMER.phases())
    make = lambda params: make_state(lambda: params, OPTIMIZER)
    batch = {name: np.asarray(x) for name, x in seeded_batch(TRANSFORMER, 8).items()}
    batch["key"], report = np.asarray(jax.random.key_data(keys_of_samples(0, np.arange(8)))), {}
    for name, sizes in {"one": (1, 1, 1), "mesh": (2, 2, 2)}.items():
        mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        boxed = lambda: make_state(lambda: REFINER.init_params(jax.random.key(0)), OPTIMIZER)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_sharded(boxed, mesh))
        state = jax.device_put(jax.jit(make)(networks.refiner_params), shardings)
        with use_mesh(mesh):
            placed, given = place_networks(networks, mesh), put_batch(batch, mesh)
            keys = jax.random.wrap_key_data(given.pop("key"))
            losses = run(functools.partial(jax.jit(step, out_shardings=(shardings, None)), placed), state, given)
            (ids,) = sample(placed, given["label"], keys, SampleOptions(cfg=1.5, top_k=12), ("ids",))
        kernel = state.params["block_0"]["ffn"]["up"]["kernel"]
        shapes = [list(x.addressable_shards[0].data.shape) for x in (kernel, ids)]
        report[name] = {"losses": losses, "ids": np.asarray(ids).tolist(), "shard_shapes": shapes}
    return report


if __name__ == "__main__":
    print(json.dumps(refiner_report()))
