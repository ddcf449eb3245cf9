"""Checkpoints in object stores: S3 by moto's server, GCS by an emulator, both on this machine."""

import jax
import numpy as np
import pytest
from stores import forget_connections, gcs, s3, store  # noqa: F401
from test_manager import abstract, assert_equal_trees, make_state, read_all, save
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.checkpoints import arrays
from mvar_jax.checkpoints.best import best_step
from mvar_jax.checkpoints.manager import Checkpoints, restore_weights
from mvar_jax.checkpoints.trees import load_tree, save_tree
from mvar_jax.errors import InputError, RunError
from mvar_jax.files.paths import as_path
from mvar_jax.training import logging
from mvar_jax.training.loop import run

CONFIG = {"lr": 0.01}


@pytest.fixture
def workdir(store, request):  # noqa: F811
    return as_path(f"{store.url}/{request.node.name.partition('[')[0]}")


def steps_in(workdir):
    return sorted({name.partition("/")[0] for name in (workdir / "checkpoints").find()})


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_newest_states_are_kept_bit_equal_and_weights_load(workdir):
    states = [make_state(step) for step in (1, 2, 3)]
    save(workdir, *states, keep=2)
    assert steps_in(workdir) == ["2", "3"]
    assert_equal_trees(read_all(workdir, states[2]), states[2])
    assert_equal_trees(restore_weights(workdir, step=2), states[1].ema)


def test_best_checkpoint_is_kept_in_a_store(workdir):
    with Checkpoints(workdir, 1) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.7), (3, 0.1)):
            checkpoints.save(make_state(step), {})
            assert checkpoints.is_best(score) == (step < 3)
            checkpoints.add_score(step, score)
        checkpoints.save(make_state(4), {})
    assert best_step(workdir) == 2
    assert steps_in(workdir) == ["2", "4", "scores.json"]


def test_checkpoint_without_its_index_is_no_checkpoint_and_is_removed(workdir):
    save(workdir, make_state(1), make_state(2))
    (workdir / "checkpoints/2/checkpoint.jsonl").unlink()  # it is written last
    assert_equal_trees(restore_weights(workdir), make_state(1).ema)
    with Checkpoints(workdir, 3) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert steps_in(workdir) == ["1"]


def test_damaged_checkpoint_in_a_store_is_kept_until_its_step_is_saved_again(workdir):
    states, lines = [make_state(step) for step in (1, 2)], []
    save(workdir, *states)
    flip(workdir / "checkpoints/2/params/dense/kernel/c/0/0")
    with pytest.raises(InputError, match="newest good one is of step 1"):
        restore_weights(workdir, prefer_ema=False)
    assert_equal_trees(read_all(workdir, states[0], say=lines.append), states[0])
    (line,) = lines
    assert "params/dense/kernel is damaged" in line and "is kept until step 2 is saved again" in line
    with Checkpoints(workdir, 3) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert steps_in(workdir) == ["1", "2"]  # looked at, not removed
    save(workdir, states[1])
    assert_equal_trees(read_all(workdir, states[1]), states[1])


def test_tree_in_a_store_is_replaced_and_its_damage_found(workdir):
    for step in (1, 2):
        save_tree(workdir / "weights", make_state(step).params)
    assert_equal_trees(load_tree(workdir / "weights"), make_state(2).params)
    flip(workdir / "weights/weights/dense/kernel/c/0/0")
    with pytest.raises(InputError, match="dense/kernel is damaged"):
        load_tree(workdir / "weights")


@pytest.fixture
def fragile(monkeypatch):
    fragile_store = pytest.importorskip("fragile_store", reason="moto is not installed").FragileStore()
    for name, value in fragile_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(arrays, "_RETRIES", {"max_retries": 1, "initial_delay": "0.1s", "max_delay": "0.1s"})
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())
    forget_connections()
    yield fragile_store
    fragile_store.close()
    forget_connections()


def test_save_returns_while_the_store_answers_nothing(fragile):
    """Only the copy to the host may hold up training: a save that asked the store for anything would not return."""
    state = make_state(2)
    with Checkpoints("s3://fragile/silent", 3) as checkpoints:
        checkpoints.save(make_state(1), {})
        checkpoints.wait()
        fragile.answers.clear()
        checkpoints.save(state, {})
        checkpoints.add_score(2, 0.5)
        assert checkpoints.is_best(0.6) and checkpoints.latest_step() == 2
        fragile.answers.set()
    assert_equal_trees(read_all("s3://fragile/silent", state), state)
    assert best_step("s3://fragile/silent") == 2


@pytest.mark.parametrize("part", ["/8/params/", "/8/checkpoint.jsonl"])
def test_store_that_dies_in_a_save_leaves_the_newest_good_checkpoint_and_the_next_run_ends_bit_equal(
    fragile, tmp_path, part
):
    workdir = f"s3://fragile/killed{len(part)}"
    fragile.die_at(part)
    with pytest.raises((RunError, OSError)) as caught:
        run(ToyTask(step_s=0.05), workdir, make_settings(23), CONFIG, has_lock=False)
    assert "\n" not in str(caught.value)
    fragile.live()
    assert_equal_trees(jax.tree.map(np.asarray, restore_weights(workdir)), weights_at(4, tmp_path / "four"))
    assert run(ToyTask(), workdir, make_settings(23), CONFIG, has_lock=False).step == 23  # no lease to outwait
    with Checkpoints(workdir, 2) as checkpoints:
        ours = checkpoints.restore(ToyTask().abstract_state())
    run(ToyTask(), tmp_path / "whole", make_settings(23), CONFIG)
    with Checkpoints(tmp_path / "whole", 2) as checkpoints:
        assert_equal_trees(ours, checkpoints.restore(abstract(ours)))


def weights_at(step, workdir):
    run(ToyTask(), workdir, make_settings(step), CONFIG)
    return jax.tree.map(np.asarray, restore_weights(workdir))
