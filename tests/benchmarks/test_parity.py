import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity.py"
QUANTITIES = [
    "tokenizer f",
    "tokenizer ids (number that differ)",
    *(f"f_hat, scale {scale}" for scale in range(10)),
    "reconstruction",
    "teacher-forcing input",
    "quantizer loss (relative)",
    "reconstruction mse (relative)",
    *(
        f"phase {i} {name}"
        for i in range(3)
        for name in ("logits", "loss (relative)", "label-dropped logits", "label-dropped loss (relative)")
    ),
    *(f"VAR {name}" for name in ("logits", "loss (relative)", "label-dropped logits")),
]


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a printed table, without its two header rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


@pytest.fixture
def parity():
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_golden_table_has_every_row_and_all_are_ok(parity, monkeypatch, capsys):
    # the draws are compared in tests/sampling
    monkeypatch.setattr(parity, "MARKOV_CFGS", ())
    monkeypatch.setattr(parity, "VAR_CFGS", ())
    assert parity.main([]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == QUANTITIES
    assert {row[3] for row in rows} == {"yes"}


def test_one_wrong_weight_fails(parity, monkeypatch, capsys):
    load = parity.load_published_files

    def load_wrong(*paths, **options):
        model = load(*paths, **options)
        table = model.params["level_embed"]
        # the embedding of the last scale, which phase 2 alone uses
        params = {**model.params, "level_embed": table.at[9, 5].add(1e-2)}
        model.networks = model.networks.replace(params=params)
        return model

    def add_phases(table, model):
        parity.add_training(table, model, "train", "phase {i}", "p{i}_")

    monkeypatch.setattr(parity, "GOLDEN_PARTS", (("mvar.pth", "markov", (add_phases,)),))
    monkeypatch.setattr(parity, "load_published_files", load_wrong)
    assert parity.main([]) == 1
    rows = rows_of(capsys.readouterr().out)
    wrong = [row[0] for row in rows if row[3] == "NO"]
    assert len(rows) > len(wrong) and wrong == [name for name in QUANTITIES if name.startswith("phase 2")]


def test_rows_judge_counts_ratios_and_nan(parity):
    table = parity.Table()
    table.add("a", "ids", ([1, 2, 3], [1, 2, 3]))
    table.add("b", "losses", (1000.0005, 1000.0))
    table.add("c", "f", ([0.0, 9e-5], [0.0, 0.0]))
    assert table.is_ok
    for kind, pair in {"ids": ([1, 2, 4], [1, 2, 3]), "losses": (1e-4, 2e-4), "f": (float("nan"), 0.0)}.items():
        table = parity.Table()
        table.add("a", kind, pair)
        assert not table.is_ok, kind


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--tokenizer", "vae.pth"], "tokenizer"),
        (["--published", "nowhere"], "tokenizer"),
        (["--published", "nowhere", "--num_images", "0"], "num_images"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, field, parity, capsys):
    assert parity.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"--{field}" in error and error.count("\n") == 1
