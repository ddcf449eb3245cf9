import json
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from mvar_jax import progress
from mvar_jax.errors import RunError
from mvar_jax.files import lines
from mvar_jax.files.lines import read_lines as read_json_lines
from mvar_jax.files.paths import as_path
from mvar_jax.training import logging
from mvar_jax.training.logging import MetricLog, StepProgress, has_line


class FakeWriter:
    def __init__(self):
        self.calls, self.is_closed = [], False

    def write_scalars(self, step, scalars):
        self.calls.append((step, scalars))

    def write_images(self, step, images):
        self.calls.append((step, {name: image.shape for name, image in images.items()}))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


@pytest.fixture
def writer(monkeypatch):
    writer = FakeWriter()
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: writer)
    return writer


def read_lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_line_holds_float32_values_and_null_for_what_is_not_finite(tmp_path, writer):
    with MetricLog(tmp_path, 0) as log:
        log.write(4, "train", {"loss": np.float32(0.1), "loss_per_scale": np.array([1 / 3, np.nan]), "n": 7})
        text = (tmp_path / "metrics.jsonl").read_text()  # there before the log is closed
    expected = '{"step": 4, "kind": "train", "loss": 0.1, "loss_per_scale": [0.33333334, null], "n": 7}\n'
    assert text == expected


def test_resumed_log_has_each_step_once(tmp_path, writer):
    for start in (0, 4):
        with MetricLog(tmp_path, start) as log:
            for step in range(start, 6):
                log.write(step, "train", {"loss": start})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "ki')  # cut by a kill
    with MetricLog(tmp_path, 6):
        lines = read_lines(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(i, 0 if i < 4 else 4) for i in range(6)]


@pytest.mark.parametrize("damaged", [b'{"kind": "\xff"}', b'{"kind": "eval"}', b'{"step": "3", "kind": "eval"}'])
def test_a_damaged_line_is_dropped_and_the_others_stay(tmp_path, writer, damaged):
    with MetricLog(tmp_path, 0) as log:
        log.write(2, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damaged + b"\n")
    assert has_line(tmp_path, "train", 2) and not has_line(tmp_path, "eval", 3)
    with MetricLog(tmp_path, 6):
        assert [line["step"] for line in read_lines(tmp_path)] == [2]


def test_finished_evaluation_is_found(tmp_path, writer):
    assert not has_line(tmp_path, "eval", 3)
    with MetricLog(tmp_path, 0) as log:
        log.write(3, "train", {"loss": 1.0})
        assert not has_line(tmp_path, "eval", 3)
        log.write(3, "eval", {"loss": 1.0})
    assert has_line(tmp_path, "eval", 3) and not has_line(tmp_path, "eval", 4)


def test_tensorboard_gets_one_scalar_per_scale(tmp_path, writer):
    with MetricLog(tmp_path, 0) as log:
        log.write(1, "train", {"loss": 2.0, "loss_per_scale": [3.0, float("nan"), 4.0]})
        log.write(1, "eval", {"loss": 2.0, "loss_per_scale": [3.0]})
    assert writer.calls == [
        (1, {"loss": 2.0, "loss/scale_0": 3.0, "loss/scale_2": 4.0}),
        (1, {"eval/loss": 2.0, "eval/loss/scale_0": 3.0}),
    ]
    assert writer.is_closed


def test_events_wait_for_a_slow_writer_and_closing_waits_too(tmp_path, monkeypatch):
    writer, may_open = FakeWriter(), threading.Event()
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: may_open.wait(10) and writer)
    log = MetricLog(tmp_path, 0)
    log.write(1, "train", {"loss": 2.0})
    assert not writer.calls
    threading.Timer(0.2, may_open.set).start()
    log.close()
    assert len(writer.calls) == 1 and writer.is_closed


def test_missing_tensorboard_is_reported_once_with_the_extra_that_brings_it(tmp_path, monkeypatch, capfd):
    for name in ("clu", "clu.metric_writers"):  # another test may have imported both
        monkeypatch.setitem(sys.modules, name, None)
    with MetricLog(tmp_path, 0) as log:
        for step in range(3):
            log.write(step, "train", {"loss": 1.0})
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "pip install 'mvar_jax[tensorboard]'" in error
    assert len(read_lines(tmp_path)) == 3


def test_broken_tensorboard_is_reported_and_does_not_stop_the_run(tmp_path, monkeypatch, capfd):
    def fail(folder):
        raise OSError("no room")

    monkeypatch.setattr(logging, "_open_summary_writer", fail)
    with MetricLog(tmp_path, 0) as log:
        log.write(1, "train", {"loss": 2.0})
    assert "no longer written: no room" in capfd.readouterr().err
    assert len(read_lines(tmp_path)) == 1


def test_pictures_are_files_too(tmp_path, writer):
    picture_YX3 = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    with MetricLog(tmp_path, 0) as log:
        log.write_pictures(450, {"samples": picture_YX3})
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["samples_000450.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "pictures/samples_000450.png"), picture_YX3)
    assert writer.calls == [(450, {"samples": (1, 4, 6, 3)})]


def test_progress_on_a_file_is_plain_lines(tmp_path, capfd):
    with StepProgress(0, 3, 8) as shown:
        for _ in range(3):
            shown.count_step(np.float32(0.5))
    text = capfd.readouterr().err
    assert text.startswith("step 3/3, ") and "loss 0.5000" in text and "MiB" in text
    assert "\r" not in text and text.count("\n") == 1


def test_rates_of_the_progress_leave_out_the_first_step_which_compiles(monkeypatch, capfd):
    now_s = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    with StepProgress(5, 10, 8) as shown:
        for seconds in (100.0, *[10.0] * 4):
            now_s[0] += seconds
            shown.count_step(np.float32(0.5))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [[f"step {i}/10", "0.8 images/s"] for i in (7, 8, 9, 10)]
    assert lines[0].endswith("00:30 left")


def test_run_of_one_step_is_shown(capfd):
    with StepProgress(0, 1, 8) as shown:
        shown.count_step(np.float32(0.5))
    assert capfd.readouterr().err.startswith("step 1/1, ")


def test_real_event_files_hold_scalars_and_pictures(tmp_path):
    with MetricLog(tmp_path, 0) as log:
        log.write(2, "train", {"loss_per_scale": [1.5, 2.5]})
        log.write_pictures(2, {"samples": np.full((4, 6, 3), 7, np.uint8)})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["loss/scale_0", "loss/scale_1", "samples"]
    (event,) = events.Tensors("loss/scale_1")
    assert event.step == 2 and make_ndarray(event.tensor_proto) == 2.5


def test_log_in_a_store_holds_lines_pictures_and_real_events(s3, tmp_path):
    workdir = as_path(s3.url) / "log"
    picture_YX3 = np.full((4, 6, 3), 7, np.uint8)
    for start in (0, 2):
        with MetricLog(workdir, start) as log:
            for step in range(start, 4):
                log.write(step, "train", {"loss": float(start)})
            log.flush()
            assert has_line(workdir, "train", 3) and not has_line(workdir, "eval", 3)
            log.write_pictures(3, {"samples": picture_YX3})
    assert [(line["step"], line["loss"]) for line in read_json_lines(workdir / "metrics.jsonl")] == [
        *((step, 0) for step in range(2)),
        *((step, 2) for step in range(2, 4)),
    ]
    assert (workdir / "pictures/samples_000003.png").is_file()
    events = list((workdir / "tensorboard").glob("events.*"))
    assert len(events) == 2
    for path in events:
        path.download(tmp_path / path.name)
    assert read_scalar_steps(tmp_path, "loss") == [0, 1, 2, 3, 2, 3]


def read_scalar_steps(folder, name):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps = []
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            steps += [event.step for value in event.summary.value if value.tag == name]
    return steps


def test_store_that_takes_no_lines_ends_the_run_with_one_sentence(s3, writer, monkeypatch):
    def fail(*_):
        raise OSError(5, "no answer")

    words = "s3://bucket/failing/metrics.jsonl cannot be written: no answer"
    with pytest.raises(RunError, match=words), MetricLog(as_path(s3.url) / "failing", 0) as log:
        log.write(0, "train", {"loss": 1.0})
        monkeypatch.setattr(lines, "write_atomically", fail)
        log.flush()
