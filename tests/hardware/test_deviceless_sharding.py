"""How d30 is split over 16 devices: bytes of its parameters, bytes that a step exchanges, and its memory.

The step is that of 169 tokens, a map that is no multiple of any block; it exchanges the weights that all steps do.
"""

import collections
import json
from pathlib import Path

import pytest

from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import devices_of
from mvar_jax.hardware.work import work_of
from mvar_jax.planning.tasks import bytes_on_device, compile_program, make_task, programs_of

pytestmark = pytest.mark.deviceless
SNAPSHOT = json.loads(Path(__file__).with_name("d30_on_16_devices.json").read_text())
LAYERS, WIDTH = 30, 1920
TARGETS = ("h100:2x8", "v5e:4x4")


def task_of(target: str, fsdp: int, *keys: str):
    try:
        devices = devices_of(target)
    except InputError as error:
        pytest.skip(f"no compiler for {target}: {error.expected}")
    keys = (f"mesh.data={16 // fsdp}", f"mesh.fsdp={fsdp}", *keys)
    return make_task(read_config("imagenet256_d30", [f"--config.{key}" for key in keys]), devices)


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_of_d30_are_halved_when_fsdp_doubles(target):
    held = {fsdp: bytes_on_device(task_of(target, fsdp).abstract_state().params) for fsdp in (8, 16)}
    assert {str(fsdp): num_bytes for fsdp, num_bytes in held.items()} == SNAPSHOT["params_bytes"]
    assert held[16] == pytest.approx(held[8] / 2, rel=0.005)  # biases, norms and positions stay whole


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_exchanges_what_its_mesh_needs(target):
    """Weights are gathered forward and backward, gradients reduced over fsdp, and their shards over data."""
    task = task_of(target, 8, "batch_size=16")
    (program,) = (one for one in programs_of(task, 16) if one.name == "step, 169 tokens")
    compiled = compile_program(task, program, target)
    found: collections.Counter = collections.Counter()
    for one in work_of(compiled.text, tuple(device.process_index for device in task.run.mesh.devices.flat))[1]:
        found[one.kind] += one.times * one.num_bytes
    gathered = 2 * (12 * 2 + 6 * 4)  # in bfloat16, the weights of the adaptive vectors in float32
    reduced = 18 * 4 * (1 + 1 / 8)
    expected = LAYERS * WIDTH**2 * (gathered + reduced)
    assert expected / 1.2 <= sum(found.values()) <= 1.2 * expected, dict(found)
    assert compiled.total_bytes <= 5.75 * 2**30  # state and gradients are 3.8 GiB of it; libtpu 0.0.48 needs 5.52
    large = {kind: round(num_bytes / 2**20) for kind, num_bytes in found.items() if num_bytes >= 2**26}
    assert large == pytest.approx(SNAPSHOT["exchanged_mib"][target], rel=0.2)
