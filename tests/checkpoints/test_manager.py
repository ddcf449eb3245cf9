import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mvar_jax.checkpoints import arrays
from mvar_jax.checkpoints.checksums import DamagedError
from mvar_jax.checkpoints.manager import Checkpoints, restore_weights
from mvar_jax.checkpoints.steps import list_steps
from mvar_jax.checkpoints.trees import load_tree, save_tree
from mvar_jax.errors import InputError
from mvar_jax.training.state import TrainState


def make_state(step=3, has_ema=True, width=16, extra=None):
    sharding = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), P())
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (width, 300)), "bias": jnp.zeros(300)},
        "list": [jax.random.normal(keys[1], (5,)).astype(jnp.bfloat16)],
    }
    ema = jax.tree.map(lambda x: x / 2, params) if has_ema else None
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = TrainState(jnp.int32(step), params, ema, optimizer.init(params), extra or {})
    return jax.device_put(state, sharding)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(workdir, *states, keep=3):
    with Checkpoints(workdir, keep) as checkpoints:
        for state in states:
            checkpoints.save(state, {"step": int(state.step)})


@pytest.mark.parametrize("has_ema", [True, False])
def test_state_is_bit_equal_and_keeps_its_types_after_restore(tmp_path, has_ema):
    state = make_state(has_ema=has_ema, extra={"usage": jnp.arange(4.0)})
    save(tmp_path, state)
    with Checkpoints(tmp_path, 3) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert_equal_trees(restored, state)
    assert restored.params["dense"]["kernel"].sharding == state.params["dense"]["kernel"].sharding
    assert json.loads((tmp_path / "checkpoints/3/meta/metadata").read_text()) == {"step": 3}


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, *(make_state(step) for step in (1, 2, 3, 4)), keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def test_saving_never_tells_jax_a_step(tmp_path, monkeypatch):
    """Only the loop may: a background thread would set this process back to the saved step.

    Processes then agree to stop at a step that this one has passed, and SIGTERM to a run of several hangs for ever.
    """
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (3, 7):
            checkpoints.save(make_state(step), {})
            checkpoints.wait()
    assert list_steps(tmp_path / "checkpoints") == [3, 7] and asked == []


def test_saved_values_are_those_at_the_call_when_the_state_is_donated(tmp_path):
    add = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    state = jax.tree.map(jnp.zeros_like, make_state(width=4000))
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(5):
            state = add(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert not np.any(checkpoints.restore(abstract(state)).params["dense"]["kernel"])


def test_weights_load_without_a_description_and_prefer_the_average(tmp_path):
    first, second = make_state(1), make_state(2)
    save(tmp_path, first, second)
    assert_equal_trees(restore_weights(tmp_path), second.ema)
    assert_equal_trees(restore_weights(tmp_path, step=1, prefer_ema=False), first.params)
    with pytest.raises(InputError, match="has no checkpoint of step 5, only of 1, 2"):
        restore_weights(tmp_path, step=5)


@pytest.mark.parametrize("step", [None, 1])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_no_damage(tmp_path, monkeypatch, step):
    """A run that keeps one checkpoint saves the next and removes this one after it was listed."""
    first, second = make_state(step=1), make_state(step=2)
    save(tmp_path, first, keep=1)
    listed = []

    def list_first(folder):
        listed.append(list_steps(folder))
        if len(listed) == 1:
            save(tmp_path, second, keep=1)
        return listed[-1]

    monkeypatch.setattr("mvar_jax.checkpoints.manager.list_steps", list_first)
    if step is None:
        assert_equal_trees(restore_weights(tmp_path), second.ema)
    else:
        with pytest.raises(InputError, match="no longer has its checkpoint of step 1: it was removed meanwhile"):
            restore_weights(tmp_path, step)


def test_weights_are_the_parameters_without_an_average(tmp_path):
    state = make_state(has_ema=False)
    save(tmp_path, state)
    assert_equal_trees(restore_weights(tmp_path), state.params)


def test_tree_survives_saving_twice(tmp_path):
    for step in (1, 2):
        save_tree(tmp_path / "new/weights", make_state(step).params)
    assert_equal_trees(load_tree(tmp_path / "new/weights"), make_state(2).params)
    assert os.listdir(tmp_path / "new") == ["weights"]


SAVE_REPLICATED = """
import sys
sys.path.insert(0, sys.argv[2])
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from test_manager import TrainState, save

mesh = jax.make_mesh((4,), ("data",))
state = TrainState(jnp.int32(1), {"kernel": jnp.ones((8, 12))}, None, {}, {})
state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: programs.append(event) if "backend_compile" in event else None
)
save(sys.argv[1], state)
print(len(programs))
"""


def test_saving_small_arrays_that_every_device_holds_compiles_nothing(tmp_path):
    """Slicing on the devices would be a program for every shape: seconds of a small model's start."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", SAVE_REPLICATED, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "0\n", result.stderr


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, position=None):
    """Invert a byte of a file, the middle one by default."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 255
    path.write_bytes(bytes(data))


def read_all(workdir, state, **options):
    with Checkpoints(workdir, 3) as checkpoints:
        return checkpoints.restore(abstract(state), **options)


def damage_array(folder):
    flip(biggest_file(folder / "params"))


def damage_description(folder):
    flip(folder / "params/_METADATA")


def remove_description(folder):
    (folder / "params/_METADATA").unlink()


def damage_layout(folder):
    flip(folder / "params/dense.kernel/zarr.json")


def remove_checksums(folder):
    (folder / "checksums.jsonl").unlink()


def remove_a_file(folder):
    biggest_file(folder / "params").unlink()


def cut_a_file(folder):
    path = biggest_file(folder / "params")
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = [
    damage_array,
    damage_description,
    damage_layout,
    remove_description,
    remove_checksums,
    remove_a_file,
    cut_a_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_checkpoint_is_refused_in_one_line_if_damaged_and_stays_where_it_is(tmp_path, damage):
    state = make_state()
    save(tmp_path, state)
    damage(tmp_path / "checkpoints/3")
    for read in (lambda: read_all(tmp_path, state), lambda: restore_weights(tmp_path, prefer_ema=False)):
        with pytest.raises(
            InputError, match=r"checkpoint .*checkpoints/3.* cannot be read: .*(damaged|missing)"
        ) as caught:
            read()
        assert caught.value.field == "checkpoint" and "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "checkpoints") == ["3"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_good_checkpoint_is_restored_and_the_damaged_ones_are_named_and_set_aside(tmp_path, damage):
    states = [make_state(step) for step in (1, 2, 3)]
    save(tmp_path, *states)
    damage(tmp_path / "checkpoints/2")
    damage(tmp_path / "checkpoints/3")
    lines = []
    assert_equal_trees(read_all(tmp_path, states[0], say=lines.append), states[0])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.damaged", "3.damaged"]
    assert len(lines) == 2 and not any("\n" in line for line in lines)
    for step, line in zip((3, 2), lines, strict=True):
        assert f"checkpoint {tmp_path}/checkpoints/{step} cannot be read: " in line
        assert line.endswith(f"it is now {tmp_path}/checkpoints/{step}.damaged; resuming from step 1 instead")
    save(tmp_path, *states[1:])
    assert_equal_trees(read_all(tmp_path, states[2]), states[2])
    assert len(os.listdir(tmp_path / "checkpoints")) == 5


def test_step_that_is_damaged_twice_is_kept_twice(tmp_path):
    for _ in range(2):
        save(tmp_path, *[make_state(step) for step in (1, 2) if not (tmp_path / f"checkpoints/{step}").exists()])
        damage_array(tmp_path / "checkpoints/2")
        read_all(tmp_path, make_state(1), say=str)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.damaged", "2.damaged2"]


def test_strict_restore_refuses_a_damaged_newest_checkpoint_and_changes_nothing(tmp_path):
    save(tmp_path, make_state(1), make_state(2))
    damage_array(tmp_path / "checkpoints/2")
    with pytest.raises(InputError, match="checkpoints/2 cannot be read"):
        read_all(tmp_path, make_state(1), strict=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_weights_of_a_damaged_newest_checkpoint_are_refused_and_the_newest_good_one_is_named(tmp_path):
    save(tmp_path, make_state(1), make_state(2), make_state(3))
    damage_array(tmp_path / "checkpoints/2")
    damage_array(tmp_path / "checkpoints/3")
    with pytest.raises(InputError, match="3 cannot be read: .*newest good one is of step 1: move .*/3 away"):
        restore_weights(tmp_path, prefer_ema=False)


def test_checkpoint_of_another_model_is_refused_even_if_an_older_one_fits(tmp_path):
    save(tmp_path, make_state(1, width=17), make_state(2, width=16))
    with pytest.raises(InputError, match="in this model"):
        read_all(tmp_path, make_state(width=17))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_storage_that_cannot_be_reached_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, make_state(1), make_state(2))

    def fail(folder, wanted):
        raise arrays.ReadError("params/list/0", "UNAVAILABLE: the store does not answer")

    monkeypatch.setattr(arrays, "read", fail)
    with pytest.raises(InputError, match="checkpoints/2 cannot be read: .*does not answer"):
        read_all(tmp_path, make_state(1))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_any_changed_byte_of_any_file_is_found(tmp_path, monkeypatch):
    """The arrays' chunks carry CRC32C checksums of tensorstore; Orbax's descriptions and `meta` are in a list."""
    monkeypatch.setattr(arrays, "OBJECT_BYTES", 512)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 128)
    tree = {"matrix": jnp.arange(256.0).reshape(16, 16), "half": jnp.ones((4, 4), jnp.bfloat16)}
    state = TrainState(jnp.int32(3), tree, None, {}, {})
    save(tmp_path, state)
    folder = tmp_path / "checkpoints/3"
    # written after the checksums, and nobody reads what is in them
    marks = ("commit_success.txt", "_CHECKPOINT_METADATA")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in marks]
    assert len(files) == 4 + 3 + 2 + 1 + 1  # objects and layouts of the arrays, descriptions, meta, checksums
    with Checkpoints(tmp_path, 3) as checkpoints:
        for path in files:
            whole = path.read_bytes()
            for position in range(0, len(whole), 13):
                flip(path, position)
                with pytest.raises(DamagedError):
                    checkpoints.restore(abstract(state))
                path.write_bytes(whole)
        assert_equal_trees(checkpoints.restore(abstract(state)), state)


def test_whole_item_is_read_beside_a_damaged_one(tmp_path):
    state = make_state()
    save(tmp_path, state)
    damage_array(tmp_path / "checkpoints/3")
    assert_equal_trees(restore_weights(tmp_path), state.ema)


def test_missing_item_is_named(tmp_path):
    save(tmp_path, make_state(has_ema=False))
    with pytest.raises(InputError, match="it has no ema"):
        read_all(tmp_path, make_state(has_ema=True))


def test_other_shapes_are_refused(tmp_path):
    save(tmp_path, make_state(width=16))
    with pytest.raises(InputError, match=r"kernel is float32\[16, 300\], in this model float32\[17, 300\]"):
        read_all(tmp_path, make_state(width=17))


def test_other_leaves_are_refused(tmp_path):
    save(tmp_path, make_state())
    with pytest.raises(InputError, match=r"extra.usage is absent, in this model float32\[4\]"):
        read_all(tmp_path, make_state(extra={"usage": jnp.zeros(4)}))


def test_damaged_or_missing_tree_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a directory of saved weights"):
        load_tree(tmp_path / "nothing")
    save_tree(tmp_path / "weights", make_state().params)
    flip(biggest_file(tmp_path / "weights"))
    with pytest.raises(InputError, match="is damaged"):
        load_tree(tmp_path / "weights")


@pytest.mark.parametrize("path", [".", "nothing"])
def test_directory_without_checkpoints_is_refused(tmp_path, path):
    with pytest.raises(InputError, match="has no checkpoint in it"):
        restore_weights(tmp_path / path)


def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    script = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from test_manager import Checkpoints, make_state
checkpoints = Checkpoints(sys.argv[1], 3)
checkpoints.save(make_state(1), {})
checkpoints.wait()
checkpoints.save(make_state(2, width=20000), {})
print("saving", flush=True)
checkpoints.wait()
print("saved", flush=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "saving\n"
    deadline_s = time.monotonic() + 30
    while not any(name.startswith("2") for name in os.listdir(tmp_path / "checkpoints")):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.communicate(timeout=30)[0] == ""  # killed before the end of the save
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
    assert_equal_trees(restore_weights(tmp_path), make_state(1).ema)
    save(tmp_path, make_state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    assert_equal_trees(restore_weights(tmp_path), make_state(2).ema)
