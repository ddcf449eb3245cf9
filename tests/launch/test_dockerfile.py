"""The image without Docker: its files, its commands, and what Kubernetes expects of it."""

import fnmatch
import json
import re
from pathlib import Path

import pytest
import yaml
from stand_ins import ROOT, Machine, make_program

TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line.split(" ", 1) for line in TEXT.splitlines() if line and not line.startswith("#")]
(JOB,) = yaml.safe_load((ROOT / "launch/k8s/jobset.yaml").read_text())["spec"]["replicatedJobs"]
(CONTAINER,) = JOB["template"]["spec"]["template"]["spec"]["containers"]
# makes an environment as `-m venv FOLDER` does, whose interpreter keeps the words that it is called with
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo 3.12; fi
if [ "$2" = venv ]; then mkdir -p $3/bin && cp {folder}/inner $3/bin/python; fi
"""


def arguments_of(instruction: str) -> list[str]:
    return [words for name, words in LINES if name == instruction]


def test_copied_files_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [source for words in arguments_of("COPY") for source in words.split()[:-1]]
    assert copied == ["requirements.txt", "."]
    needed = "requirements.txt pyproject.toml setup.py README.md LICENSE mvar_jax configs launch tests"
    for name in needed.split():
        assert (ROOT / name).exists() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_git_and_the_image_ignore_the_same_build_outputs():
    git = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    docker = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert git - {"*.tmp"} <= docker


@pytest.mark.parametrize("extras", ["", "cuda12", "tpu"])
def test_commands_install_the_requirements_with_the_extras_of_the_build(tmp_path, extras):
    machine = Machine(tmp_path)
    (machine.bin / "sh").symlink_to("/bin/sh")
    (machine.bin / "cp").symlink_to("/bin/cp")
    log = tmp_path / "log"
    make_program(tmp_path / "inner", f'#!/bin/sh\necho "$@" >> {log}\n')
    make_program(machine.bin / "python3.12", PYTHON.format(folder=tmp_path))
    assert arguments_of("ARG") == ['EXTRAS=""']
    for command in arguments_of("RUN"):
        result = machine.run("sh", "-c", command, EXTRAS=extras)
        assert result.returncode == 0, result.stderr
    requirements = f"-r requirements.txt jax[{extras}]" if extras else "-r requirements.txt"
    first, pip, second, last = log.read_text().splitlines()
    assert first.endswith(requirements) and second.endswith(requirements) and last.endswith("-e .")
    assert "install" in pip and "pip>=" in pip
    assert (machine.copy / ".venv/.ready").exists()


def test_program_of_the_image_is_the_one_that_kubernetes_starts():
    (folder,), (entry,) = arguments_of("WORKDIR"), arguments_of("ENTRYPOINT")
    assert CONTAINER["workingDir"] == folder
    program, *words = json.loads(entry)
    assert [str(Path(program).relative_to(folder)), *words] == CONTAINER["command"][:3]


def test_image_is_built_under_the_name_that_kubernetes_pulls():
    built = re.findall(r"docker build .*-t (\S+) \.", TEXT)
    assert built and set(built) == {CONTAINER["image"]}
