"""The notebooks: kept without outputs, and each runs from top to bottom."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parent.parent.parent
NOTEBOOKS = REPOSITORY / "notebooks"
NAMES = ("sampling", "editing", "training_digits")


def read(name: str):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_kept(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def execute(name: str, monkeypatch, **parameters) -> list:
    """The outputs of a notebook whose cell of parameters got other values."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # else it warns
    # compiling is most of it
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0")
    notebook = read(name)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    known = {line.split(" = ")[0] for line in cell.source.splitlines() if not line.startswith("#")}
    assert known >= set(parameters)
    cell.source += "".join(f"\n{field} = {value!r}" for field, value in parameters.items())
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def count_figures(outputs) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize(("name", "num_figures"), [("sampling", 6), ("editing", 5)])
def test_it_runs_on_any_model(tiny_model, monkeypatch, name, num_figures):
    outputs = execute(name, monkeypatch, MODEL=str(tiny_model), LABELS=[0, 2], NUM=2)
    assert count_figures(outputs) == num_figures


def test_training_runs_and_names_held_out_digits(run, monkeypatch):
    flags = {"TOKENIZER_FLAGS": run.tokenizer_flags, "TRANSFORMER_FLAGS": run.transformer_flags}
    outputs = execute("training_digits", monkeypatch, RUN=str(run.root), **flags)
    assert count_figures(outputs) == 4
    assert "of 360 held-out images named right" in outputs[-1]["data"]["text/plain"]
