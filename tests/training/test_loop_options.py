import json

import jax
import numpy as np
import pytest
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.errors import InputError
from mvar_jax.training import logging
from mvar_jax.training.loop import LoopSettings, run

CONFIG = {"lr": 0.01}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


@pytest.mark.parametrize(
    "change", [{"num_steps": -1}, {"save_every_steps": -1}, {"picture_every_steps": -2}, {"log_every_steps": 2.5}]
)
def test_impossible_settings_are_refused(change):
    good = dict.fromkeys((field for field in LoopSettings.__dataclass_fields__), 1)
    ((field, value),) = change.items()
    with pytest.raises(
        InputError, match=f"config.{field} must be a whole number of at least .*got {value}"
    ) as caught:
        LoopSettings(**(good | change))
    assert caught.value.field == f"config.{field}"


def test_profiler_records_the_steps_asked_for(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    task = ToyTask(on_step=events.append)
    run(task, tmp_path, make_settings(7, profile_steps=(2, 4)), CONFIG)
    assert events == [0, 1, str(tmp_path / "profile"), 2, 3, "stop", 4, 5, 6]


def test_profiler_stops_where_the_run_does(tmp_path):
    run(ToyTask(), tmp_path, make_settings(3, profile_steps=(1, 9)), CONFIG)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", [(3,), (3, 3), (-1, 2), (3, 5)])
def test_impossible_profile_steps_are_refused(steps):
    with pytest.raises(InputError, match="config.profile_steps must be .*as .10, 15.*, got") as caught:
        make_settings(3, profile_steps=steps)
    assert caught.value.field == "config.profile_steps"


def test_known_peak_gives_the_share_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mvar_jax.training.loop.peak_flops", lambda kind: 1e9)
    run(ToyTask(), tmp_path, make_settings(7), CONFIG)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        share = line["images_per_s"] / ToyTask.examples_per_step * 1e6 / 1e9 / jax.device_count()
        np.testing.assert_allclose(line["mfu"], share, rtol=1e-5)
