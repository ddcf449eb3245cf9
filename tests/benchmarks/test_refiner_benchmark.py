import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "refiner.py"
spec = importlib.util.spec_from_file_location("refiner_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize(("whole", "status"), [(1149, 0), (1151, 1)])
def test_steps_of_each_form_are_counted_and_memory_is_held_to_its_bound(monkeypatch, tmp_path, whole, status):
    """Of ten maps: a step for each that the transformer draws, and the waves of the others."""
    compiled = lambda *_, refiner: SimpleNamespace(total_bytes=1000 if refiner is None else whole)
    monkeypatch.setattr(benchmark, "compile_sampler", compiled)
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n")
    assert benchmark.main(["--target", "h100", f"--record={results}"]) == status
    lines = results.read_text().splitlines()
    assert lines[0] == "# Results" and f"`--target h100 --record={results}`, jax" in lines[4]
    rows = [line.split(" | ") for line in lines[10:]]
    steps = [(row[0].strip("| "), row[1], row[4]) for row in rows]
    k3, k5 = [("k = 3", "8", "103"), ("k = 3", "10", "184")], [("k = 5", "8", "133"), ("k = 5", "10", "241")]
    full = [("full causal", "8", "257"), ("full causal", "10", "680")]
    assert steps == [("transformer", "10", "10"), *full, *k3, *k5]
