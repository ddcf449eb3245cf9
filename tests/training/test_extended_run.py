"""A finished run that goes on to more steps."""

import json
import os
import signal

import pytest
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.processes import group
from mvar_jax.training import logging
from mvar_jax.training.loop import run

SHORT, LONG = 12, 16


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


def train(workdir, num_steps, task=None, **changes):
    return run(task or ToyTask(), workdir, make_settings(num_steps, **changes), {"num_steps": num_steps})


def evaluations(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}


class Stopped(ToyTask):
    """Gets SIGTERM while its checkpoint is restored."""

    def abstract_state(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().abstract_state()


def test_a_stop_before_the_first_new_step_keeps_the_evaluation_of_the_old_end(tmp_path):
    train(tmp_path, SHORT)
    before = evaluations(tmp_path)
    assert train(tmp_path, LONG, Stopped()).interrupted == signal.SIGTERM
    assert evaluations(tmp_path) == before
    train(tmp_path, LONG)
    after = evaluations(tmp_path)
    assert list(after) == [0, 5, 10, SHORT, 15, LONG] and before.items() <= after.items()


def test_the_evaluation_of_the_old_end_is_not_repeated_unless_it_is_due(tmp_path):
    train(tmp_path, SHORT)
    task = ToyTask()
    train(tmp_path, LONG, task)
    assert task.evaluated_steps == [15, LONG]


def test_a_repeated_evaluation_replaces_its_line(tmp_path):
    train(tmp_path, 10)
    path = tmp_path / "metrics.jsonl"
    other = path.read_text().splitlines()
    other[-1] = json.dumps(json.loads(other[-1]) | {"loss": -1.0})
    path.write_text("".join(text + "\n" for text in other))
    train(tmp_path, LONG)
    assert list(evaluations(tmp_path)) == [0, 5, 10, 15, LONG] and evaluations(tmp_path)[10] > 0


class Second(group.Group):
    """A process whose storage does not show the last line yet; the first process has read it."""

    def __init__(self):
        super().__init__(index=1)

    def gather(self, name, value):
        return [name == "whether the run is complete" or value, value]


def test_the_first_process_decides_for_all_whether_a_run_is_complete(tmp_path):
    train(tmp_path, SHORT)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    task = ToyTask()
    group.set_current(Second())
    try:
        train(tmp_path, SHORT, task)
    finally:
        group.set_current(group.Group())
    assert not task.evaluated_steps
