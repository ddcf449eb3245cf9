"""The launch files: their syntax, and the command line that each ends in, parsed with the real flags and configs."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from command_case import check_command

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("[!_]*.py"))
MORE = ["--config.num_steps=7", "--config.data.cache=a folder"]


@pytest.fixture
def record(tmp_path):
    """Stand-ins for python and srun that write the words they are called with; and what was written.

    They write their folder and PYTHONSAFEPATH into the file `where`.
    """
    written, folder = tmp_path / "words", tmp_path / "bin"
    (tmp_path / "copy/.venv/bin").mkdir(parents=True)
    folder.mkdir()
    for path in (folder / "srun", tmp_path / "copy/.venv/bin/python"):
        path.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" > {written}\necho "$PWD $PYTHONSAFEPATH" > {tmp_path}/where\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    shutil.copytree(LAUNCH, tmp_path / "copy/launch")

    def run(script: str, *arguments: str, cwd: Path = tmp_path / "copy", **environment: str):
        result = subprocess.run(
            ["bash", str(tmp_path / "copy/launch" / script), *arguments],
            cwd=cwd,
            env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result, written.read_text().splitlines() if written.exists() else []

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound_shell(path):
    assert subprocess.run(["bash", "-n", path], timeout=60).returncode == 0
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ") and "set -euo pipefail" in lines
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-x", path], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_local_script_trains_every_config(record, config):
    result, words = record("local.sh", f"configs/{config}", "runs/x", *MORE)
    assert result.returncode == 0, result.stderr
    read = check_command([".venv/bin/python", *words[1:]], f"configs/{config}", "runs/x", "off")
    assert read["num_steps"] == 7 and read["data"]["cache"] == "a folder"


def test_local_script_works_in_the_folder_of_its_user(record, tmp_path):
    """Relative paths, those of options too, are the user's; a folder mvar_jax there is not taken for the package."""
    project = tmp_path / "project"
    project.mkdir()
    result, words = record("local.sh", "my.py", "runs/x", *MORE, cwd=project)
    assert result.returncode == 0, result.stderr
    assert words[1:] == ["-m", "mvar_jax", "train", "--config", "my.py", "--workdir", "runs/x", *MORE]
    assert words[0] == str(tmp_path / "copy/.venv/bin/python")
    assert (tmp_path / "where").read_text() == f"{project} 1\n"


def test_slurm_script_trains_the_config(record):
    result, words = record("slurm.sbatch", "configs/imagenet256_d24.py", "runs/x", *MORE)
    assert result.returncode == 0, result.stderr
    check_command(words[words.index(".venv/bin/python") :], "configs/imagenet256_d24.py", "runs/x", "auto")


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch"])
def test_missing_arguments_are_one_line_and_status_2(record, script):
    result, words = record(script, "configs/debug.py")
    assert result.returncode == 2 and not words
    assert result.stderr.count("\n") == 1 and "CONFIG and WORKDIR are required" in result.stderr


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "prepare_imagenet.sh"])
def test_script_without_its_environment_names_the_setup_with_status_2(record, tmp_path, script):
    (tmp_path / "copy/.venv/bin/python").unlink()
    for name in ("train", "val"):
        (tmp_path / f"ILSVRC2012_img_{name}.tar").touch()
    arguments = [str(tmp_path)] if script == "prepare_imagenet.sh" else ["configs/debug.py", "runs/x"]
    result, words = record(script, *arguments)
    assert result.returncode == 2 and not words
    assert result.stderr.count("\n") == 1 and "launch/setup.sh` first" in result.stderr


def test_slurm_script_outside_a_checkout_says_so(record, tmp_path):
    result, words = record("slurm.sbatch", "configs/debug.py", "runs/x", cwd=tmp_path)
    assert result.returncode == 2 and not words
    assert result.stderr == f"error: {tmp_path} is no checkout of mvar_jax: submit the job from the checkout\n"
