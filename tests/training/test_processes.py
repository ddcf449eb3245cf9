"""Several real processes: trained, killed and resumed by another number of them, through the `train` command."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def start(workdir, cache, devices, *more, steps=9):
    """A training process of the debug tokenizer in float32 on the CPU with so many virtual devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    overrides = [f"--config.num_steps={steps}", "--config.save_every_steps=4", "--config.eval_every_steps=0"]
    overrides += ["--config.picture_every_steps=3"]
    overrides += ["--config.codebook.warmup_steps=0", "--config.codebook.revive_every_steps=0"]
    command = [
        sys.executable,
        "tests/training/plain_train.py",
        "train",
        "--config",
        "configs/debug.py",
        "--workdir",
        str(workdir),
    ]
    return subprocess.Popen(
        [*command, *overrides, *more],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*processes):
    results = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output + errors for output, errors in results]


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start_pair(workdir, cache, *more, **options):
    address = free_address()
    return [start(workdir, cache, 2, f"--distributed={address},2,{i}", *more, **options) for i in range(2)]


def read_losses(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): line["loss"] for line in lines}


def read_picture(workdir, step):
    return np.asarray(Image.open(workdir / "pictures" / f"reconstructions_{step:06d}.png"), int)


def wait_for(path, processes):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("one")
    finish(start(workdir, cache, 4))
    return workdir


def test_two_processes_killed_and_resumed_as_one_equal_one_process(tmp_path, cache, one_process):
    pair = start_pair(tmp_path, cache, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    try:
        wait_for(tmp_path / "checkpoints" / "4", pair)
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert not (tmp_path / "checkpoints" / "9").exists()
    # each process held a half of the weights; step 3 is before the checkpoint, so nobody draws its picture again
    drawn, expected = (read_picture(workdir, step=3) for workdir in (tmp_path, one_process))
    assert np.abs(drawn - expected).max() <= 1 and expected.std() > 10
    (output,) = finish(start(tmp_path, cache, 4))
    assert "resuming from step" in output
    ours, expected = read_losses(tmp_path), read_losses(one_process)
    assert ours.keys() == expected.keys() and ("train", 8) in ours
    for key, loss in expected.items():
        np.testing.assert_allclose(ours[key], loss, rtol=1e-5, err_msg=str(key))
