import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.checkpoints.manager import Checkpoints, restore_weights
from mvar_jax.errors import InputError
from mvar_jax.processes.holding import hold
from mvar_jax.training import logging
from mvar_jax.training.loop import RunError, run

NUM_STEPS = 23
CONFIG = {"lr": 0.01}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


def read_metrics(workdir):
    """Return the lines of metrics.jsonl without the speed, which differs from run to run."""
    path = Path(workdir) / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def read_state(workdir):
    with Checkpoints(workdir, 2) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(ToyTask().abstract_state()))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())
        assert run(ToyTask(), workdir, make_settings(NUM_STEPS), CONFIG)[:2] == (NUM_STEPS, None)
    return workdir


def assert_same_run(workdir, expected_workdir):
    assert read_metrics(workdir) == read_metrics(expected_workdir)
    left, right = read_state(workdir), read_state(expected_workdir)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_lines_are_those_of_the_intervals_and_of_both_ends(whole_run):
    steps = {"train": [], "eval": []}
    for line in read_metrics(whole_run):
        steps[line["kind"]].append(line["step"])
    assert steps == {"train": list(range(0, NUM_STEPS, 2)), "eval": [0, 5, 10, 15, 20, NUM_STEPS]}
    assert os.listdir(whole_run / "pictures") == [f"weights_{NUM_STEPS:06d}.png"]
    assert sorted(os.listdir(whole_run / "checkpoints")) == ["20", "23"]
    assert json.loads((whole_run / "checkpoints/23/meta/metadata").read_text())["config"] == CONFIG


@pytest.mark.parametrize(("every", "steps"), [(-1, []), (0, [6]), (4, [4, 6])])
def test_pictures_are_drawn_when_asked_for(tmp_path, every, steps):
    run(ToyTask(), tmp_path, make_settings(6, picture_every_steps=every), CONFIG)
    pictures = tmp_path / "pictures"
    assert sorted(path.name for path in pictures.glob("*")) == [f"weights_{step:06d}.png" for step in steps]


@contextlib.contextmanager
def start_process(workdir, step_s):
    command = [sys.executable, toy_run.__file__, str(workdir), str(NUM_STEPS), str(step_s)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    try:
        yield process
    finally:
        deadline.cancel()
        process.kill()
        process.communicate()


def wait_for_step(process, step):
    while (line := process.stdout.readline()) != f"step {step}\n":
        assert line, "the process ended early"


def test_run_killed_five_times_and_terminated_ends_bit_equal_to_a_whole_one(tmp_path, whole_run):
    random_s = random.Random(time.time_ns())
    kills = [(at_step, signal.SIGKILL) for at_step in (2, 5, 8, 11, 14)]
    for at_step, number in (*kills, (17, signal.SIGTERM)):
        with start_process(tmp_path, step_s=0.05) as process:
            wait_for_step(process, at_step)
            time.sleep(random_s.uniform(0, 0.1))
            process.send_signal(number)
            output, _ = process.communicate(timeout=60)
    step, interrupted = map(int, output.split("result")[1].split())
    assert interrupted == signal.SIGTERM and 17 < step < NUM_STEPS
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    task = ToyTask()
    assert run(task, tmp_path, make_settings(NUM_STEPS), CONFIG)[:2] == (NUM_STEPS, None)
    assert task.num_inits == 0
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("stop_step", [1, 4, 7])
def test_interrupted_run_resumes_bit_equal(tmp_path, whole_run, stop_step):
    before = signal.getsignal(signal.SIGINT)
    task = ToyTask(on_step=lambda step: step == stop_step and os.kill(os.getpid(), signal.SIGINT))
    result = run(task, tmp_path, make_settings(NUM_STEPS), CONFIG)
    assert result[:2] == (stop_step + 1, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG)
    assert_same_run(tmp_path, whole_run)


def test_run_stopped_in_its_last_step_is_complete(tmp_path, whole_run):
    task = ToyTask(on_step=lambda step: step == NUM_STEPS - 1 and os.kill(os.getpid(), signal.SIGTERM))
    assert run(task, tmp_path, make_settings(NUM_STEPS), CONFIG)[:2] == (NUM_STEPS, None)
    assert_same_run(tmp_path, whole_run)


def test_second_interrupt_aborts_at_once(tmp_path):
    steps = []

    def interrupt(step):
        steps.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(ToyTask(on_step=interrupt), tmp_path, make_settings(NUM_STEPS), CONFIG)
    assert steps[-1] == 3 and not os.listdir(tmp_path / "checkpoints")
    run(ToyTask(), tmp_path, make_settings(5), CONFIG)  # the lock is free again


def test_failed_task_leaves_the_last_checkpoint_and_the_lock_free(tmp_path, whole_run):
    def fail(step):
        if step == 10:
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        run(ToyTask(on_step=fail), tmp_path, make_settings(NUM_STEPS), CONFIG)
    assert int(read_state(tmp_path).step) == 8
    run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG)
    assert_same_run(tmp_path, whole_run)


def test_complete_run_returns_at_once_without_its_libraries(tmp_path, capsys):
    run(ToyTask(), tmp_path, make_settings(3), CONFIG)
    capsys.readouterr()
    script = f"""
import sys
from toy_run import *
task = ToyTask()
assert run(task, {str(tmp_path)!r}, make_settings(3), {CONFIG!r}).step == 3
slow = {{"tensorflow", "clu", "grain", "scipy", "jax.experimental.pallas.triton"}}
assert not task.num_inits and not slow & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", "."])}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("\n") == 1 and b"already holds step 3 of 3" in done.stdout


def test_final_evaluation_is_repeated_after_a_kill_before_it(tmp_path):
    run(ToyTask(), tmp_path, make_settings(3), CONFIG)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    task = ToyTask()
    run(task, tmp_path, make_settings(3), CONFIG)
    assert path.read_text() == whole and task.evaluated_steps == [3]


def test_run_stops_after_enough_bad_steps_in_a_row(tmp_path):
    steps = []
    task = ToyTask(bad_steps=range(9, NUM_STEPS), on_step=steps.append)
    with pytest.raises(RunError, match="not finite for 3 steps in a row, up to step 11.*checkpoint of step 8"):
        run(task, tmp_path, make_settings(NUM_STEPS, save_every_steps=8), CONFIG)
    assert len(steps) <= 14
    assert np.all(np.isfinite(restore_weights(tmp_path)["kernel_DD"]))


def test_separate_bad_steps_do_not_stop_the_run(tmp_path, monkeypatch):
    def update(state, x_BD, step):
        new, metrics = toy_update(state, x_BD, step)
        keep = lambda old, new: jax.numpy.where(metrics["is_bad"], old, new)
        return jax.tree.map(keep, state, new).replace(step=new.step), metrics

    toy_update = toy_run.update
    monkeypatch.setattr(toy_run, "update", update)
    task = ToyTask(bad_steps=(1, 2, 4, 5))
    assert run(task, tmp_path, make_settings(7), CONFIG).step == 7
    lines = {line["step"]: line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train"}
    assert lines[2] is None and lines[4] is None and lines[6] is not None


def test_end_of_the_data_is_an_error(tmp_path):
    with pytest.raises(RunError, match="the data ended at step 5 of 7"):
        run(ToyTask(num_batches=5), tmp_path, make_settings(7), CONFIG)


def test_failed_save_is_one_line(tmp_path, monkeypatch):
    def fail(self, state, meta):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(RunError, match="could not be written to .*No space left"):
        run(ToyTask(), tmp_path, make_settings(7), CONFIG)


def test_workdir_in_use_is_refused(tmp_path):
    def run_again(step):
        if step == 2:
            with pytest.raises(InputError, match="workdir .* is in use by another run"):
                run(ToyTask(), tmp_path, make_settings(4), CONFIG)
            refused.append(step)

    refused = []
    run(ToyTask(on_step=run_again), tmp_path, make_settings(4), CONFIG)
    assert refused == [2]


def test_workdir_in_use_is_not_looked_at_if_asked_so(tmp_path, capfd):
    with hold("workdir", tmp_path):
        run(ToyTask(), tmp_path, make_settings(4), CONFIG, has_lock=False)
    assert f"workdir {tmp_path} is not locked: no other run may use it meanwhile\n" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_workdir_without_locks_is_held_by_a_lease_that_ends_with_the_run(tmp_path, monkeypatch, capfd):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    seen = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    run(ToyTask(on_step=lambda step: seen.append((tmp_path / ".lease").exists())), tmp_path, make_settings(4), CONFIG)
    assert seen == [True] * 4 and not (tmp_path / ".lease").exists()
    assert (
        "its file system has no locks (Function not implemented); the lease .lease is kept" in capfd.readouterr().err
    )


def test_other_configuration_changes_nothing_once_there_is_a_checkpoint(tmp_path):
    """Before the first checkpoint it replaces the old one."""
    (tmp_path / "config.json").write_text('{"lr": 0.5}')
    run(ToyTask(), tmp_path, make_settings(4), CONFIG)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="config.lr is 0.5, but the run in .* has 0.01"):
        run(ToyTask(), tmp_path, make_settings(4), {"lr": 0.5})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_second_start_with_another_configuration_leaves_that_of_the_running_one(tmp_path):
    """The lock refuses it before it writes, although no checkpoint binds yet."""

    def start_other(step):
        if step == 1:
            with pytest.raises(InputError, match="in use by another run"):
                run(ToyTask(), tmp_path, make_settings(4), {"lr": 0.5})
            refused.append(json.loads((tmp_path / "config.json").read_text()))

    refused = []
    run(ToyTask(on_step=start_other), tmp_path, make_settings(4), CONFIG)
    assert refused == [CONFIG]


def test_run_outside_the_main_thread_installs_no_handlers(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(ToyTask(), tmp_path, make_settings(3), CONFIG)))
    thread.start()
    thread.join(60)
    assert results[0].step == 3


class Flag:
    """An `is_bad` that records when it is read."""

    def __init__(self, step, events):
        self._step, self._events = step, events

    def __bool__(self):
        self._events.append(f"read {self._step}")
        return False

    def __float__(self):
        return 0.0


def test_next_steps_are_dispatched_before_one_is_read(tmp_path):
    events = []

    class Recorder(ToyTask):
        def train_step(self, state, batch, step):
            events.append(f"dispatch {step}")
            state, metrics = super().train_step(state, batch, step)
            return state, metrics | {"is_bad": Flag(step, events)}

    run(Recorder(), tmp_path, make_settings(5, eval_every_steps=0, save_every_steps=4), CONFIG)
    to_the_save = "dispatch 0,dispatch 1,dispatch 2,read 0,dispatch 3,read 1,read 2,read 3"
    assert ",".join(events) == to_the_save + ",dispatch 4,read 4"


def test_full_disk_during_a_save_is_one_line_and_the_previous_checkpoint_stays_good(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.decode().strip()}")
    try:

        def fill(step):
            if step == 6:  # after the save of step 4, before that of step 8
                while not (tmp_path / "checkpoints/4").exists():
                    time.sleep(0.01)
                with contextlib.suppress(OSError), (tmp_path / "ballast").open("wb") as file:
                    while True:
                        file.write(bytes(4096))
                        file.flush()

        with pytest.raises(RunError, match="checkpoint could not be written to") as caught:
            run(ToyTask(on_step=fill), tmp_path, make_settings(NUM_STEPS, log_every_steps=50), CONFIG)
        assert "\n" not in str(caught.value)
        (tmp_path / "ballast").unlink()
        assert int(read_state(tmp_path).step) == 4
        assert run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG).step == NUM_STEPS
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def damage(folder):
    path = folder / "params/kernel_DD/c/0/0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


def test_run_whose_newest_checkpoint_is_damaged_ends_bit_equal_from_an_older_one(tmp_path, whole_run, capsys):
    run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # killed before its last evaluation
    damage(tmp_path / "checkpoints/23")
    capsys.readouterr()
    assert run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG).step == NUM_STEPS
    said, resumed, *_ = capsys.readouterr().out.splitlines()
    assert "checkpoints/23 cannot be read" in said and "resuming from step 20 instead" in said
    assert "resuming from step 20 of 23" in resumed
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "23", "23.damaged"]
    assert_same_run(tmp_path, whole_run)


def test_strict_run_refuses_a_damaged_newest_checkpoint(tmp_path):
    run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG)
    (tmp_path / "metrics.jsonl").write_text("")
    damage(tmp_path / "checkpoints/23")
    with pytest.raises(InputError, match="checkpoints/23 cannot be read"):
        run(ToyTask(), tmp_path, make_settings(NUM_STEPS), CONFIG, strict=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "23"]
