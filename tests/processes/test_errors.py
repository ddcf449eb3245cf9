"""Two processes of one training run: what goes wrong in one of them ends both, soon and with one reason."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_kill import ROOT, end_all, free_address, wait_for_step

END_S = 15


def start(workdirs, environment=None, steps=10**6, how=""):
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, "tests/toy_run.py", str(workdir), str(steps), "0.02", f"{address},2,{index}", how],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, workdir in enumerate(workdirs)
    ]


FULL = "runs/toy/metrics.jsonl: No space left on device"


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        ("1:6:input", 2, "process 1 of 2: 201 bad images, but data.max_bad_share=0.01 allows 200"),
        ("0:6:disk", 1, f"process 0 of 2: {FULL}; the newest checkpoint is intact"),
        ("1:6:bug", 1, "process 1 of 2: ZeroDivisionError: by zero"),
    ],
)
def test_an_error_in_the_middle_ends_both_with_its_reason_once(tmp_path, failure, status, reason):
    pair = start([tmp_path] * 2, {"TOY_FAIL": failure})
    wait_for_step(pair[0], 6)
    statuses, _, errors = end_all(pair, END_S)
    assert statuses == [status] * 2
    assert f"error: {reason}\n" in errors[0]
    assert "".join(errors).count("error: ") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]


def test_an_error_at_the_start_ends_both_before_anything_is_written(tmp_path):
    statuses, _, errors = end_all(start([tmp_path / "run"] * 2, {"TOY_FAIL": "1:start:input"}), 60)
    assert statuses == [2, 2]
    assert "error: process 1 of 2: 201 bad images" in errors[0] and "".join(errors).count("error: ") == 1
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_processes_that_a_user_s_program_has_joined_hold_the_workdir_together(tmp_path):
    statuses, outputs, errors = end_all(start([tmp_path] * 2, steps=6, how="own"), 120)
    assert statuses == [0, 0], errors
    assert "result 6 None" in outputs[0] and "result 6 None" in outputs[1]


def test_workdirs_of_their_own_are_refused_by_both_before_anything_is_written(tmp_path):
    pair = start([tmp_path / "a", tmp_path / "b"], {"MVAR_SHARED_SECONDS": "2"})
    statuses, _, errors = end_all(pair, 120)
    assert statuses == [2, 2]
    assert "must be on storage that all processes share: process 1 of 2" in errors[0]
    assert "".join(errors).count("error: ") == 1
    assert list(Path(tmp_path).iterdir()) == []


def test_a_workdir_in_use_is_refused_by_both_with_the_reason_of_the_one_that_saw_it(tmp_path):
    with subprocess.Popen(
        [sys.executable, "tests/toy_run.py", str(tmp_path), "1000000", "0.02"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            wait_for_step(holder, 1)
            statuses, _, errors = end_all(start([tmp_path] * 2), 120)
        finally:
            holder.kill()
    assert statuses == [2, 2]
    assert f"workdir {tmp_path} is in use" in errors[0] and "".join(errors).count("error: ") == 1


def losses_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of a run of 200 steps."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    statuses, _, errors = end_all(start([workdir] * 2, steps=200), 200)
    assert statuses == [0, 0], errors
    return losses_of(workdir)


def test_a_signal_to_one_lets_both_save_and_the_next_start_is_bit_equal(tmp_path, undisturbed):
    """Three starts are ended, each by another signal, and the fourth comes to the end."""
    step = 0
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        pair = start([tmp_path] * 2, steps=200)
        wait_for_step(pair[0], step + 6)
        pair[1].send_signal(number)
        statuses, outputs, errors = end_all(pair, 60)
        assert statuses == [0, 0], errors
        results = [output.split("result")[1].split() for output in outputs]
        assert results[0] == results[1] and results[0][1] == str(int(number)), "all end with the status of one signal"
        last, step = step, int(results[0][0])
        assert last < step < 200 and (tmp_path / "checkpoints" / str(step)).is_dir()
    statuses, _, errors = end_all(start([tmp_path] * 2, steps=200), 120)
    assert statuses == [0, 0], errors
    assert losses_of(tmp_path) == undisturbed
