import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mvar_jax.planning.calibration import Rates

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planned.py"
spec = importlib.util.spec_from_file_location("planned_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
MIB = 2**20


def test_a_heap_has_grown_by_what_was_held_at_once():
    with benchmark.Heap() as heap:
        for _ in range(3):
            held = np.ones(8 * MIB, np.uint8)
            benchmark.threading.Event().wait(20 * benchmark.POLL_S)
            del held
    assert 7 * MIB <= heap.grown_bytes < 12 * MIB  # other threads free a little meanwhile


@pytest.mark.parametrize(("slow", "status"), [(False, 0), (True, 1)])
def test_training_steps_are_held_to_the_bounds_of_memory_and_time(monkeypatch, tmp_path, slow, status):
    """A step that takes what is predicted passes; one that takes twice as long does not."""
    work = {}

    def run(task, program, argument_bytes, rounds):
        figures = work[program.name]
        seconds = benchmark.estimate(figures, benchmark.machine_for("here")).total_s * (2 if slow else 1)
        return [1.04 * figures.peak_bytes / MIB] * rounds, [seconds] * rounds

    def compile_figures(task, program, target, compiled=benchmark.compile_figures):
        return work.setdefault(program.name, compiled(task, program, target))

    monkeypatch.setattr("mvar_jax.planning.calibration.measure_rates", measure := (lambda: RATES))
    measure.cache_clear = lambda: None
    monkeypatch.setattr(benchmark, "measure_rates", measure)
    monkeypatch.setattr(benchmark, "compile_figures", compile_figures)
    monkeypatch.setattr(benchmark, "run", run)
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n")
    flags = ["--config", "debug_transformer", "--tokenizer", "debug", "--samples", "2", "--rounds", "2"]
    assert benchmark.main([*flags, f"--record={results}"]) == status
    rows = [line.split(" | ") for line in results.read_text().splitlines()[10:]]
    assert sorted(row[0].strip("| ") for row in rows) == sorted(work)
    assert all(row[3] == "4" and row[6].strip("| ") == ("2" if slow else "1") for row in rows)


RATES = Rates({"float32": 1e9, "bfloat16": 1e9}, 1e9, 1e-6, 1e-12)


def test_a_program_that_runs_is_measured():
    task = benchmark.make_task(
        benchmark.read_config("debug_transformer", []),
        tuple(benchmark.jax.devices()[:1]),
        100,
        benchmark.build.build_module(benchmark.read_config("debug", [])),
    )
    step = benchmark.programs_of(task, 2)[0]
    peaks, seconds = benchmark.run(task, step, 2**30, 2)
    assert len(peaks) == len(seconds) == 2 and min(seconds) > 0
    assert all(1024 <= peak < 1024 + 64 for peak in peaks)
