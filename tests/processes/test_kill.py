"""Four processes of one training run: one is killed, the others end soon, and the next start goes on bit-equal.

MVAR_KILLS=20 kills at 20 random moments in each way of placing the state; the default is once, with a sharded state.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.stopping import LOST_STATUS

ROOT = Path(__file__).parents[2]
COUNT, NUM_STEPS = 4, 60
KILLS = int(os.environ.get("MVAR_KILLS", "1"))
PLACINGS = ["sharded", "replicated"] if KILLS > 1 else ["sharded"]
END_S = 15  # all others have ended so long after one of them


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(workdir, *kinds, count=COUNT, num_steps=NUM_STEPS):
    address = free_address()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "tests/toy_run.py", str(workdir), str(num_steps), "0.02"]
    return [
        subprocess.Popen(
            [*command, f"{address},{count},{index}", *kinds],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def end_all(processes, seconds):
    """Wait for all to end within the deadline; return (statuses, outputs, errors)."""
    deadline = time.monotonic() + seconds
    try:
        results = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs, errors = zip(*results, strict=True)
    return [process.returncode for process in processes], outputs, errors


def wait_for_step(process, step):
    """Read the process's output up to a step; it prints each one."""
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return
    raise AssertionError(process.stderr.read())


def result_of(workdir):
    """The metrics of all steps, without rates, and the final weights."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s", None)
        line.pop("wait_share", None)
    weights = {name: restore_weights(workdir, prefer_ema=name == "ema")["kernel_DD"] for name in ("ema", "params")}
    return lines, {name: np.asarray(kernel_DD).tolist() for name, kernel_DD in weights.items()}


@pytest.fixture(scope="module", params=PLACINGS)
def placing(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, placing):
    workdir = tmp_path_factory.mktemp(placing)
    statuses, _, errors = end_all(start(workdir, placing), 200)
    assert statuses == [0] * COUNT, errors
    return result_of(workdir)


@pytest.mark.parametrize("seed", range(KILLS))
def test_any_process_may_be_killed_at_any_moment(tmp_path, placing, undisturbed, seed):
    rng = random.Random(f"{placing}{seed}")
    victim, step, later_s = rng.randrange(COUNT), rng.randrange(NUM_STEPS - 10), rng.random() * 0.3
    processes = start(tmp_path, placing)
    wait_for_step(processes[0], step)
    time.sleep(later_s)
    processes[victim].kill()
    statuses, _, errors = end_all(processes, END_S)
    assert statuses[victim] == -signal.SIGKILL
    others = [status for index, status in enumerate(statuses) if index != victim]
    if victim:
        assert others == [LOST_STATUS] * (COUNT - 1), errors
        assert f"error: process {victim} of {COUNT}: it ended without a word" in errors[0]
    else:
        assert set(others) <= {LOST_STATUS, -signal.SIGABRT}, "JAX may notice the first process's end before we do"
    statuses, outputs, errors = end_all(start(tmp_path, placing), 200)
    assert statuses == [0] * COUNT, errors
    assert step < 6 or re.search(r"resuming from step \d+ of", outputs[0])
    assert result_of(tmp_path) == undisturbed


def test_processes_extend_a_run_although_one_reads_its_files_late(tmp_path):
    """All must agree on which evaluations are due, whenever each of them reads metrics.jsonl.

    The first process rewrites that file as soon as it can, and an evaluation of a sharded state needs all processes.
    """
    for num_steps in (12, 14):
        statuses, _, errors = end_all(start(tmp_path, "sharded", "slow", count=2, num_steps=num_steps), 100)
        assert statuses == [0, 0], errors
    lines, _ = result_of(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 5, 10, 12, 14]
