import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LABELS, INDEX = [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 40, 50, 0, 7]
MESHES = {"one": {"data": 1}, "data": {"data": 4}, "fsdp and tensor": {"data": 1, "fsdp": 2, "tensor": 2}}

# runs in a child process, since the number of CPU devices is fixed when jax starts
PROGRAM = r"""
import json, math, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
import small_case
from mvar_jax.sampling import sampler
from mvar_jax.sampling.bulk import place_networks
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.sampler import SampleOptions, sample
from mvar_jax.sharding import make_mesh, spec_of, use_mesh
from mvar_jax.models.networks import Networks

labels, index, meshes = json.loads(sys.argv[1])
assert jax.device_count() == 4
sampler.DRAW_ELEMENTS["cpu"] = 3 * 16 * 16  # so that every device works in chunks, as in decoding
MODEL, TOKENIZER = (x.clone(sides=(1, 2, 4)) for x in (small_case.MODEL, small_case.TOKENIZER))
LATER = MODEL.clone(depth=1)  # draws the last scale, so that the switch is on the mesh too
tokenizer_params = small_case.seeded_params(TOKENIZER, std=1.0)
networks = Networks(TOKENIZER, tokenizer_params, MODEL, small_case.seeded_params(MODEL))
networks = networks.switched(networks.replace(transformer=LATER, params=small_case.seeded_params(LATER)), 2)
options = SampleOptions(cfg=1.5, top_k=12, top_p=0.95)


def draw(axes):
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    by_batch = NamedSharding(mesh, spec_of(("batch",)))
    placed = place_networks(networks, mesh)
    with use_mesh(mesh):
        arrays = (
            placed,
            jax.device_put(jnp.asarray(labels), by_batch),
            jax.device_put(keys_of_samples(0, index), by_batch),
        )
        program = sample.lower(*arrays, options, ("ids", "images")).compile()
        ids, images = program(*arrays)
    return {
        "collectives": re.findall(r"= \S+ (all-\w+|collective-permute|reduce-scatter)", program.as_text()),
        "images": np.asarray(images).tolist(),
        "ids": np.asarray(ids).tolist(),
        "num_shards": len({str(shard.index) for shard in ids.addressable_shards}),
        "are_weights_whole": all(
            params["blocks"]["attention"]["qkv"].sharding.is_fully_replicated
            for params in (placed.params, placed.later.params)
        ),
    }


print(json.dumps({name: draw(axes) for name, axes in meshes.items()}))
"""


@pytest.fixture(scope="module")
def draws() -> dict:
    """By mesh: ids, images, number of shards, collectives, and whether each device held all weights."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps([LABELS, INDEX, MESHES])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_devices_share_the_work(draws):
    assert [draws[name]["num_shards"] for name in MESHES] == [1, 4, 2]
    assert [draws[name]["are_weights_whole"] for name in MESHES] == [True, True, False]


def test_devices_that_share_a_batch_need_no_collective(draws):
    assert draws["data"]["collectives"] == []
    assert "all-reduce" in draws["fsdp and tensor"]["collectives"]


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_ids_do_not_depend_on_the_devices(name, draws):
    np.testing.assert_array_equal(draws[name]["ids"], draws["one"]["ids"])


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_images_do_not_depend_on_the_devices(name, draws):
    one = np.asarray(draws["one"]["images"])
    assert one.shape == (8, 8, 8, 3) and one.std() > 0.1
    np.testing.assert_allclose(draws[name]["images"], one, atol=1e-5)


def test_samples_of_different_label_or_index_differ(draws):
    num_different = len(set(zip(LABELS, INDEX, strict=True)))
    assert num_different == 7
    assert len(np.unique(draws["one"]["ids"], axis=0)) == num_different
