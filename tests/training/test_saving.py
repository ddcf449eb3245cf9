"""No checkpoint holds weights that are not proven good."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.training import logging, loop, saving
from mvar_jax.training.loop import RunError, run
from mvar_jax.training.state import all_finite

CONFIG = {"lr": 0.01}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


@pytest.fixture
def skips_bad_updates(monkeypatch):
    """The toy task leaves its weights alone in a bad step, as the real ones do."""

    def update(state, x_BD, step):
        new, metrics = toy_update(state, x_BD, step)
        keep = lambda old, new: jnp.where(metrics["is_bad"], old, new)
        return jax.tree.map(keep, state, new).replace(step=new.step), metrics

    toy_update = toy_run.update
    monkeypatch.setattr(toy_run, "update", update)


def kept_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def newest_state(workdir):
    with Checkpoints(workdir, 9) as checkpoints:
        return checkpoints.restore(ToyTask().abstract_state())


def test_poisoned_weights_are_never_saved_and_a_restart_begins_with_the_last_good_ones(tmp_path, capsys):
    """Bad steps fewer than max_bad_steps pass many saves; each would replace a good checkpoint by a poisoned one."""
    settings = make_settings(30, save_every_steps=1, max_bad_steps=6)
    with pytest.raises(RunError, match="for 6 steps in a row, up to step 13; .* the checkpoint of step 7$"):
        run(ToyTask(bad_steps=range(8, 30)), tmp_path, settings, CONFIG)
    assert kept_steps(tmp_path) == [7], "that of step 8 holds the weights that gave the first bad loss"
    assert all_finite(newest_state(tmp_path))
    capsys.readouterr()
    assert run(ToyTask(), tmp_path, settings, CONFIG)[:2] == (30, None)
    assert "resuming from step 7 of 30" in capsys.readouterr().out


def test_the_only_checkpoint_stays_whatever_follows(tmp_path):
    with pytest.raises(RunError, match="keeps the checkpoint of step 4"):
        run(ToyTask(bad_steps=range(4, 30)), tmp_path, make_settings(30, keep_checkpoints=1), CONFIG)
    assert kept_steps(tmp_path) == [4]


def test_error_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    with pytest.raises(RunError, match="has no checkpoint yet"):
        run(ToyTask(bad_steps=range(9)), tmp_path, make_settings(30), CONFIG)


def test_a_save_that_was_due_after_a_bad_step_is_made_after_the_next_good_one(tmp_path, skips_bad_updates, capsys):
    settings = make_settings(9, keep_checkpoints=9)
    assert run(ToyTask(bad_steps=(2, 3)), tmp_path, settings, CONFIG).step == 9
    assert kept_steps(tmp_path) == [5, 8, 9]
    said = [line for line in capsys.readouterr().out.splitlines() if "is not saved" in line]
    reason = "the loss or the gradient of the last step was not finite"
    assert said == [f"step 4 is not saved: {reason}; {tmp_path} has no checkpoint yet"]


def test_weights_that_a_good_step_made_infinite_are_not_saved(tmp_path, monkeypatch):
    """The loss of a step is that of the weights before it."""

    def update(state, x_BD, step):
        new, metrics = toy_update(state, x_BD, step)
        ema = jax.tree.map(lambda x: jnp.where(step >= 5, jnp.inf, x), new.ema)
        return new.replace(ema=ema), metrics

    toy_update = toy_run.update
    monkeypatch.setattr(toy_run, "update", update)
    with pytest.raises(RunError, match="the weights of the last step, 10, are not good to keep; .* of step 4"):
        run(ToyTask(), tmp_path, make_settings(10), CONFIG)
    assert kept_steps(tmp_path) == [4]


def test_a_bad_last_step_is_complete_if_its_weights_evaluate(tmp_path, skips_bad_updates):
    assert run(ToyTask(bad_steps=(9,)), tmp_path, make_settings(10), CONFIG)[:2] == (10, None)
    assert kept_steps(tmp_path) == [8, 10]


@pytest.mark.parametrize("metrics", [{"fid_1k": 2.0, "other": float("nan")}, {}])
def test_a_bad_last_step_is_complete_without_a_loss_in_its_evaluation(tmp_path, skips_bad_updates, metrics):
    """A scorer without a validation split gives other scalars; without any evaluation finite weights are enough."""
    task = ToyTask(bad_steps=(9,))
    task.evaluate = lambda state: metrics
    assert run(task, tmp_path, make_settings(10), CONFIG)[:2] == (10, None)
    assert kept_steps(tmp_path) == [8, 10]


def test_a_bad_last_step_is_not_good_if_the_loss_is_not_although_another_number_is(tmp_path, skips_bad_updates):
    task = ToyTask(bad_steps=(9,))
    task.evaluate = lambda state: {"loss": float("nan"), "codebook_used_percent": 5.0}
    with pytest.raises(RunError, match="the weights of the last step, 10, are not good to keep"):
        run(task, tmp_path, make_settings(10), CONFIG)


def test_a_run_stopped_after_a_bad_step_keeps_the_older_checkpoint(tmp_path, skips_bad_updates, capsys):
    stop = lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM)
    result = run(ToyTask(bad_steps=(6,), on_step=stop), tmp_path, make_settings(10), CONFIG)
    assert result[:2] == (7, signal.SIGTERM) and kept_steps(tmp_path) == [4]
    *_, refused, stopped = capsys.readouterr().out.splitlines()
    assert refused.startswith("step 7 is not saved: ") and refused.endswith("keeps the checkpoint of step 4")
    assert stopped.startswith("stopped by SIGTERM at step 7 of 10; ") and "step 4; the same command" in stopped


def test_a_run_does_not_begin_with_a_checkpoint_that_an_older_version_poisoned(tmp_path, monkeypatch):
    poisoned = ToyTask(bad_steps=range(3, 9))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "all_finite", lambda state: True)
        patch.setattr(saving.Saver, "drop_poisoned", lambda self, step: None)
        patch.setattr(loop._Loop, "_save", lambda self, state, step, **more: self._saver.save(state, step, True))
        with pytest.raises(RunError, match="for 9 steps in a row"):
            run(poisoned, tmp_path, make_settings(30, max_bad_steps=9), CONFIG)
    with pytest.raises(RunError, match=r"checkpoint of step 12 in .* numbers that are not finite; move it away to"):
        run(ToyTask(), tmp_path, make_settings(30), CONFIG)


@pytest.mark.parametrize("place", ["params", "ema", "opt_state", "extra"])
def test_one_bad_number_anywhere_in_a_state_is_found(place):
    state = ToyTask().init_state().replace(extra={"hits": jnp.zeros(3)})
    assert all_finite(state)
    spoil = lambda x: jnp.asarray(x).at[(0,) * x.ndim].set(np.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    assert not all_finite(state.replace(**{place: jax.tree.map(spoil, getattr(state, place))}))
