"""How `--distributed` is read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar_jax.errors import InputError
from mvar_jax.processes import join


def test_processes_are_those_of_the_option_or_of_the_environment():
    assert join.parse_distributed("a:1,2,1") == ("a:1", 2, 1)
    assert join.parse_distributed("auto") is None


@pytest.mark.parametrize("option", ["on", "a:1", "a,2,0", "a:1,2,2", "a:1,two,0"])
def test_processes_that_cannot_be_meant_are_refused(option):
    with pytest.raises(InputError, match="distributed must be .*HOST:PORT,NUM,INDEX.*, got") as caught:
        join.parse_distributed(option)
    assert caught.value.field == "distributed" and caught.value.given == option


ROOT = Path(__file__).parents[2]
# one task of `srun --nodes=1 --ntasks-per-node=1 --gpus-per-node=8`
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}


def train(workdir, **environment):
    program = ROOT / "tests/training/plain_train.py"
    command = [sys.executable, str(program), "train", "--config", "debug", "--workdir", str(workdir)]
    return subprocess.run(
        [*command, "--distributed", "auto", "--config.num_steps=5", "--config.picture_every_steps=-1"],
        env=os.environ | environment,
        cwd=workdir.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_cards_that_jax_would_leave_idle_are_refused(tmp_path):
    result = train(tmp_path / "run", **SLURM, JAX_PLATFORMS="")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.splitlines()[-1].startswith("error: this process was given 8 cards, but jax sees none")


def test_the_first_line_names_processes_devices_and_mesh(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    result = train(tmp_path / "run", **SLURM, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[0] == "1 process x 2 devices (cpu), mesh data=2"


def test_run_without_any_source_of_processes_is_told_to_stay_alone(tmp_path):
    result = train(tmp_path / "run", JAX_PLATFORMS="cpu")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    error = result.stderr.splitlines()[-1]
    assert error.startswith(
        "error: --distributed=auto found neither JAX_COORDINATOR_ADDRESS nor Open MPI, Slurm or a"
    )
    assert "use --distributed=off for one process, or set JAX_COORDINATOR_ADDRESS" in error
