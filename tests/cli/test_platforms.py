"""JAX_PLATFORMS that names nothing usable here: one sentence and status 2 from every command that needs a device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar_jax.errors import InputError
from mvar_jax.processes import platforms, together

ROOT = Path(__file__).parents[2]


def run(given: str, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "mvar_jax", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": given}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("train", "cdua", ["JAX_PLATFORMS", "got 'cdua'. Did you mean cuda?", "installed here: cpu", "unset"]),
        ("train", "cuda", ["JAX_PLATFORMS=cuda", "the extra cuda12 or cuda13", "installed here: cpu", "unset"]),
        ("plan", "gpu", ["JAX_PLATFORMS=gpu", "the extra cuda12 or cuda13"]),
        ("plan", "tpu", ["JAX_PLATFORMS=tpu", "the extra tpu", "installed here: cpu", "unset"]),
    ],
)
def test_platform_that_is_not_here_is_one_sentence(tmp_path, command, given, words):
    if {"gpu": "cuda"}.get(given, given) in platforms.installed():
        pytest.skip(f"the plugin of {given} is installed")
    topology = "h100" if given == "gpu" else "here"
    more = ["--workdir", str(tmp_path / "run")] if command == "train" else ["--topology", topology]
    result = run(given, command, "--config", "configs/debug.py", *more)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert not (tmp_path / "run").exists()


def start_error(message: str) -> Exception:
    """Return an exception that passed through the function of jax that starts backends."""
    scope = {"__name__": "jax._src.xla_bridge"}
    exec("def backends(error):\n    raise error", scope)
    try:
        scope["backends"](RuntimeError(message))
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tpu", "JAX_PLATFORMS=tpu does not start here (in use by process 7); unset JAX_PLATFORMS or set it to cpu"),
        ("", "jax finds no device that starts (in use by process 7); set JAX_PLATFORMS=cpu to use the CPU"),
    ],
)
def test_device_that_does_not_start_is_reported_with_the_reason_of_jax(monkeypatch, given, words):
    monkeypatch.setenv("JAX_PLATFORMS", given)
    monkeypatch.setattr(platforms, "installed", lambda: ("cpu", "tpu"))
    message = "Unable to initialize backend 'tpu': in use by process 7 (set JAX_PLATFORMS='' to choose)"
    assert words in str(platforms.explain(start_error(message)))


def test_reason_is_found_below_an_error_of_our_own(monkeypatch):
    """Code that reads a checkpoint reports every failure as damage; a missing device is no damage."""
    monkeypatch.setenv("JAX_PLATFORMS", "cdua")

    def program():
        try:
            raise start_error("")
        except RuntimeError as error:
            raise InputError("checkpoint cannot be read", field="checkpoint") from error

    said = []
    monkeypatch.setattr(together.group, "say_why", lambda *words: said.append(words))
    assert together.run_together(program) == 2
    assert said[0][1].startswith("JAX_PLATFORMS must name platforms that jax knows")


def test_other_errors_are_not_taken_for_a_failed_start():
    assert platforms.explain(RuntimeError("Unable to initialize backend 'tpu'")) is None
