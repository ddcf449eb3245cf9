"""Lines of the log hold every scale, although a step trains a part of them."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.scales import Pyramid
from mvar_jax.training import logging
from mvar_jax.training.loop import run
from mvar_jax.training.newest import NewestPerScale
from mvar_jax.training.transformer_step import PhaseOptions
from mvar_jax.training.transformer_task import TransformerTask

CONFIG = {"lr": 0.01}
NUM_STEPS = 23
SETTINGS = {"log_every_steps": 8, "save_every_steps": 4, "picture_every_steps": -1}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


class Phased(ToyTask):
    """A cycle of four steps trains the scales (0, 1), (0, 1), (2,) and (3,): steps of the log only the first two."""

    def scales_of_step(self, step):
        return ((0, 1), (0, 1), (2,), (3,))[step % 4]

    def train_step(self, state, batch, step):
        state, metrics = super().train_step(state, batch, step)
        is_trained = np.isin(np.arange(4), self.scales_of_step(step))
        return state, metrics | {"loss_per_scale": jnp.where(is_trained, metrics["loss"] + jnp.arange(4), jnp.nan)}


def train(workdir, task=None, **changes):
    return run(task or Phased(), workdir, make_settings(NUM_STEPS, **(SETTINGS | changes)), CONFIG)


def lines_of(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["loss_per_scale"]) for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())
        train(workdir)
    return lines_of(workdir)


def test_a_line_has_the_newest_value_of_every_scale_and_the_loss_of_its_step(tmp_path, undisturbed):
    train(tmp_path, log_every_steps=1)
    losses = {step: loss for step, (loss, _) in lines_of(tmp_path).items()}
    assert undisturbed[0][1][2:] == [None, None], "no step has trained them yet"
    for step, (loss, vector) in undisturbed.items():
        assert loss == losses[step]
        trained = [[s for s in range(step + 1) if k in Phased().scales_of_step(s)] for k in range(4)]
        newest = [max(steps) for steps in trained if steps]
        np.testing.assert_allclose(vector[: len(newest)], [losses[s] + k for k, s in enumerate(newest)], rtol=1e-6)


@pytest.mark.parametrize("stop_step", [3, 6, 14, 15])
def test_lines_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path, undisturbed, stop_step):
    task = Phased(on_step=lambda step: step == stop_step and os.kill(os.getpid(), signal.SIGINT))
    assert train(tmp_path, task).interrupted == signal.SIGINT
    train(tmp_path)
    assert lines_of(tmp_path) == undisturbed


def test_a_bad_step_leaves_the_value_of_the_last_good_one(tmp_path, monkeypatch):
    class Bad(Phased):
        def train_step(self, state, batch, step):
            kept = jax.tree.map(jnp.copy, state)
            new, metrics = super().train_step(state, batch, step)
            return (kept.replace(step=kept.step + 1) if step == 16 else new), metrics

    train(tmp_path, Bad(bad_steps=(16,)))
    loss, vector = lines_of(tmp_path)[16]
    assert loss is None and None not in vector


def test_vectors_stay_on_the_device_but_for_lines_and_checkpoints(tmp_path):
    fetched = []

    class Vector:
        ndim, shape = 1, (4,)

        def __init__(self, step):
            self._step = step

        def __array__(self, *args, **kwargs):
            fetched.append(self._step)
            return np.zeros(4, np.float32)

    class Recorder(Phased):
        def train_step(self, state, batch, step):
            state, metrics = super().train_step(state, batch, step)
            return state, metrics | {"loss_per_scale": Vector(step)}

    train(tmp_path, Recorder(), save_every_steps=0)
    assert set(fetched) == {0, 8, 7, 6, 16, 15, 14, 22, 21, 19}


def test_vectors_of_a_checkpoint_are_bit_equal():
    newest = NewestPerScale()
    newest.note((0, 2), {"loss": np.float32(1), "loss_per_scale": jnp.array([0.1, np.nan, np.inf])})
    again = NewestPerScale(json.loads(json.dumps(newest.to_json())))
    assert again.to_json() == newest.to_json()
    assert again.fetch()["loss_per_scale"][0] == np.float32(0.1)


@pytest.mark.parametrize("schedule", ["paper", "joint"])
def test_steps_of_a_cycle_train_every_scale(schedule):
    pyramid, options = Pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 8, 7), PhaseOptions(schedule)
    task = object.__new__(TransformerTask)
    task.options, task.transformer = options, pyramid  # a pyramid has its phases
    found = {scale for step in range(options.cycle(len(pyramid.phases()))) for scale in task.scales_of_step(step)}
    assert found == set(range(10))
