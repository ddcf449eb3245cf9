"""A run whose workdir is in an object store: killed, refused while it runs, resumed, with the numbers of a disk's."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mvar_jax.files.lines import read_lines
from mvar_jax.files.paths import as_path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120
NUM_STEPS = 60


def start(workdir, num_steps, step_s, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MVAR_LEASE_SECONDS": "12"}
    command = [sys.executable, str(ROOT / "tests/toy_run.py"), str(workdir), str(num_steps), str(step_s)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


def wait_for(path, process):
    deadline_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} never came"
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


def losses(workdir):
    return [(line["kind"], line["step"], line["loss"]) for line in read_lines(workdir / "metrics.jsonl")]


def test_run_in_a_store_is_killed_and_resumed_with_the_numbers_of_a_disk(s3, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    workdir, started = as_path(s3.url) / "run", []
    try:
        started.append(start(workdir, NUM_STEPS, 1.0, here))
        wait_for(workdir / "checkpoints" / "4", started[0])
        started.append(start(workdir, NUM_STEPS, 0, here))
        _, errors = started[1].communicate(timeout=DEADLINE_S)
        assert started[1].returncode and f"is in use by another run, process {started[0].pid} on " in errors
        started[0].kill()
        for place in (workdir, tmp_path / "disk"):
            process = start(place, NUM_STEPS, 0, here)
            started.append(process)
            output, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, errors
            assert ("resuming from step" in output) == (place == workdir)
    finally:
        for process in started:
            process.kill()
            with contextlib.suppress(ValueError):
                process.communicate()
    ours, expected = losses(workdir), losses(tmp_path / "disk")
    assert ours == expected and ("train", NUM_STEPS - 1) in [line[:2] for line in ours]
    assert json.loads((workdir / "config.json").read_text()) == {"lr": 0.01}
    assert not (workdir / ".lease").exists() and os.listdir(here) == []
