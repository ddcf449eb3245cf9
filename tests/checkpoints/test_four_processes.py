import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from four_processes import SIDE

ROOT = Path(__file__).parents[2]
CHECKPOINT_BYTES = 4 * SIDE**2 * 4


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(workdir, what each of the four processes printed: lists of words)."""
    workdir = tmp_path_factory.mktemp("four")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("four_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(workdir), address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return workdir, [[line.split() for line in output.splitlines()] for output, _ in results]


def column(words, name):
    return [[[int(word) for word in line[1:]] for line in lines if line[0] == name] for lines in words]


def test_each_of_four_processes_reads_its_quarter_of_a_sharded_checkpoint(words):
    for own in column(words[1], "restored"):
        _, num_read = own[0]
        assert 0.25 * CHECKPOINT_BYTES <= num_read <= 0.35 * CHECKPOINT_BYTES


def test_processes_that_all_hold_the_state_write_a_part_of_it_each(words):
    for ((num_written,),) in column(words[1], "written"):
        assert num_written <= 0.35 * CHECKPOINT_BYTES


def test_damage_that_one_process_reads_makes_all_resume_from_the_same_older_step(words):
    assert [[step for step, _ in own] for own in column(words[1], "restored")] == [[3, 2, 3]] * 4


def test_damage_is_said_once_and_the_damaged_step_can_be_saved_again(words):
    workdir, lines = words
    said = [" ".join(line[1:]) for own in lines for line in own if line[0] == "said"]
    assert len(said) == 1 and "checkpoints/3 cannot be read: params/layer_2 is damaged" in said[0]
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2", "3", "3.damaged"]
