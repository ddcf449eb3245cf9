"""The notebooks: stored without outputs, and each runs from top to bottom."""

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


def with_parameters(notebook, **parameters) -> list:
    """Return the cells of a notebook, with other values in its cell of parameters."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert all(f"\n{name} = " in f"\n{cell.source}" for name in parameters)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook.cells


def test_they_run_from_top_to_bottom(tiny_model, run, monkeypatch):
    """Every cell of every notebook runs, shows its figures and ends with its text.

    All run in one kernel, reset before each notebook, since starting and compiling take most of the time. A renamed
    module, option or result of the API breaks it.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # otherwise it warns
    tiny = {"MODEL": str(tiny_model), "LABELS": [0, 2], "NUM": 2}
    flags = {"TOKENIZER_FLAGS": run.tokenizer_flags, "TRANSFORMER_FLAGS": run.transformer_flags}
    cells = {
        "sampling": with_parameters(read("sampling"), **tiny),
        "editing": with_parameters(read("editing"), **tiny),
        "training_digits": with_parameters(read("training_digits"), RUN=str(run.root), HELD_OUT=16, **flags),
    }
    whole = read("sampling")
    whole.cells = [cell for part in cells.values() for cell in (nbformat.v4.new_code_cell("%reset -f"), *part)]
    NotebookClient(whole, timeout=200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = {
        name: [output.get("data", {}) for cell in part if cell.cell_type == "code" for output in cell.outputs]
        for name, part in cells.items()
    }
    num_figures = {name: sum("image/png" in data for data in parts) for name, parts in outputs.items()}
    assert num_figures == {"sampling": 6, "editing": 5, "training_digits": 4}
    assert "of 4 samples classified as their label" in outputs["sampling"][-1]["text/plain"]
    assert "of 16 held-out images classified correctly" in outputs["training_digits"][-1]["text/plain"]
