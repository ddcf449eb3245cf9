import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import planned
from benchmarks.stages import footprint
from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.planning.tasks import make_task, programs_of
from mvar_jax.training.programs import Program

MIB = 2**20
FLAGS = ["--config", "debug_transformer", "--tokenizer", "debug", "--samples", "2", "--rounds", "2"]


def test_the_memory_of_a_cpu_is_the_most_that_was_held_at_once():
    kept = np.ones(32 * MIB, np.uint8)
    with footprint.count_allocations() as counted:
        for _ in range(3):
            held = np.ones(8 * MIB, np.uint8)
            del held
    assert 8 * MIB <= counted[0] < 9 * MIB and kept.size


def test_a_cpu_without_the_library_that_counts_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(footprint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install memray"), footprint.count_allocations():
        pass


def compiled(name: str, is_step: bool = True, is_refused: bool = False) -> dict:
    return {"name": name, "is_step": is_step, "is_refused": is_refused, "peak_bytes": 100 * MIB, "predicted_s": []}


@pytest.fixture
def answers(monkeypatch):
    """Give the answers of children by what they are asked for."""
    given = {}

    def ask(what, argv, folder):
        if what == planned.ALL:
            return {"device": "1 x card", "programs": given["programs"]}
        return given[what]

    monkeypatch.setattr(planned, "ask", ask)
    return given


@pytest.mark.parametrize(("slow", "status"), [(1, 0), (2, 1)])
def test_training_steps_are_held_to_the_bounds_of_memory_and_time(answers, tmp_path, slow, status):
    """A step that takes what is predicted passes; one that takes twice as long does not. The sampler may."""
    answers["programs"] = [compiled("step"), compiled("sample 2", is_step=False)]
    answers["step"] = {"peaks": [90.0, 104.0], "seconds": [slow * 1.0] * 2, "predicted_s": [1.0, 0.5]}
    answers["sample 2"] = {"peaks": [150.0] * 2, "seconds": [9.0] * 2, "predicted_s": [1.0]}
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n")
    assert planned.main([*FLAGS, f"--record={results}"]) == status
    text = results.read_text()
    assert f"`{' '.join(FLAGS)} --record={results}`, jax {jax.__version__}, 1 x card" in text
    assert f"| step | 100 | 97 (90..104) | 4 | 1000 | {slow}000 ({slow}000..{slow}000) | {slow} |" in text
    assert text.rstrip().splitlines()[-1].startswith("| sample 2 | 100 |")


def test_a_program_that_fails_leaves_the_others(answers, tmp_path, capsys):
    answers["programs"] = [compiled("large", is_refused=True), compiled("killed"), compiled("step")]
    answers |= {"killed": None, "step": {"peaks": [None], "seconds": [1.0], "predicted_s": [1.0]}}
    assert planned.main(FLAGS) == 1
    shown = capsys.readouterr().out
    assert "| large | the compiler found it too large |" in shown and "| killed | its process failed |" in shown
    assert "| step | 100 |  |  | 1000 | 1000 (1000..1000) | 1 |" in shown


def test_training_steps_come_first_by_rising_work_and_parts_are_chosen(capsys):
    programs = [
        Program("sample", "sample 2", None, (), 0, 2, 1.0),
        Program("train", "step, 256 tokens", None, (), 1, 2, 3.0),
        Program("cache", "cache tokens", None, (), 0, 2),
        Program("train", "step, 91 tokens", None, (), 1, 2, 2.0),
    ]
    names = lambda parts: [program.name for program in planned.chosen(programs, parts)]
    steps = ["step, 91 tokens", "step, 256 tokens"]
    assert names(["cache", "sample", "train"]) == [*steps, "sample 2", "cache tokens"]
    assert names(["train"]) == steps
    with pytest.raises(SystemExit):
        planned.main([*FLAGS, "--parts", "train,draw"])
    assert "must be some of train, sample, cache, got draw" in capsys.readouterr().err


def small_task():
    tokenizer = build.build_module(read_config("debug", []))
    return make_task(read_config("debug_transformer", []), tuple(jax.devices()[:1]), 100, tokenizer)


def test_a_program_that_runs_is_measured():
    task = small_task()
    peaks, seconds = footprint.run(task, programs_of(task, 2)[-1], 2**30, 2)
    assert len(peaks) == len(seconds) == 2 and min(seconds) > 0
    assert all(1024 <= peak < 1024 + 64 for peak in peaks)


# what `run` reports of a program as on an accelerator: compiled here, then found in the cache
LOADING = """
import jax, jax.numpy as jnp
from benchmarks.stages import footprint
from mvar_jax.training.programs import Program
from mvar_jax.sharding import make_mesh
from types import SimpleNamespace

task = SimpleNamespace(run=SimpleNamespace(mesh=make_mesh(devices=jax.devices()[:1])))
jitted = jax.jit(lambda x: x + 1)
footprint.make = lambda shapes: (jnp.ones(2),)
footprint.peak_mib = lambda: 7.0
footprint.is_cpu = lambda: False
for _ in range(2):
    print(footprint.run(task, Program("train", "step", jitted, (), 1, 1), 0, 2)[0])
    jax.clear_caches()
"""


def test_the_peak_of_a_process_that_had_to_compile_is_not_reported(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, "PYTHONPATH": str(planned.ROOT), **cache}
    done = subprocess.run(
        [sys.executable, "-c", LOADING], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["[None]", "[7.0, 7.0]"], done.stderr


# the script, whose processes take this CPU for an accelerator
APART = """
import sys
from benchmarks import planned
from benchmarks.stages import footprint

footprint.is_cpu = lambda: False
footprint.peak_mib = lambda: 7.0
planned.__file__ = __file__
sys.exit(planned.main())
"""


def test_an_accelerators_programs_are_found_in_the_cache_that_another_process_filled(tmp_path):
    """A program that its own process had to compile would have no figure."""
    (script := tmp_path / "script.py").write_text(APART)
    command = [sys.executable, str(script), *FLAGS, "--parts", "cache"]
    environment = {**os.environ, "PYTHONPATH": str(planned.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name, predicted, measured, *_ = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert (name, measured) == ("cache tokens of 64", "7 (7..7)") and float(predicted) > 0


def test_a_program_on_a_cpu_is_measured_beside_its_plan():
    task = small_task()
    found = planned.measure_one(task, planned.chosen(programs_of(task, 2), ["train"])[0], 2)
    assert len(found["peaks"]) == len(found["seconds"]) == len(found["predicted_s"]) == 2
    assert found["peak_bytes"] > 0 and min(found["peaks"]) > 0 and min(found["predicted_s"]) > 0
