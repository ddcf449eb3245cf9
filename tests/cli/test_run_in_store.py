"""A tokenizer, a token cache, a transformer and samples with every path in an object store: the numbers of a disk."""

import os

import numpy as np

from mvar_jax.__main__ import main
from mvar_jax.files.lines import read_lines
from mvar_jax.files.npz import load_npz
from mvar_jax.files.paths import as_path


def losses(workdir):
    return [(line["kind"], line["step"], line["loss"]) for line in read_lines(as_path(workdir) / "metrics.jsonl")]


def test_run_with_every_path_in_a_store_gives_the_numbers_of_a_disk(run, s3, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = as_path(s3.url) / "whole_run"
    moved = lambda command: [part.replace(str(run.root), str(root)) for part in command]
    tokens, transformer = root / "tokens", root / "transformer"
    assert main([*moved(run.train_tokenizer), f"--workdir={root}/tokenizer"]) == 0
    assert main([*moved(run.cache), f"--out={tokens}"]) == 0
    assert main([*moved(run.train_transformer), f"--workdir={transformer}"]) == 0
    for name in ("tokenizer", "transformer"):
        assert losses(root / name) == losses(run.root / name) and losses(root / name)
    sample = ["sample", "--labels=0", "--num=2", "--save_tokens"]
    assert main([*sample, f"--checkpoint={transformer}", f"--out={root}/samples"]) == 0
    assert main([*sample, f"--checkpoint={run.transformer}", f"--out={tmp_path}/samples"]) == 0
    stored, local = load_npz(root / "samples/tokens.npz"), load_npz(tmp_path / "samples/tokens.npz")
    np.testing.assert_array_equal(stored["ids"], local["ids"])
    capsys.readouterr()
    assert main([*moved(run.train_transformer), f"--workdir={transformer}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["samples"]
    assert not any(name.endswith((".lease", ".tmp")) for name in root.find())
