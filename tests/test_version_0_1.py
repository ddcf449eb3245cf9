"""Workdirs, model directories and token caches that version 0.1.0 wrote still load, with the same numbers.

golden/version_0_1.zip was written by the commands of 0.1.0: a debug tokenizer, its token cache, a debug transformer
trained on it with keep_best, and what 0.1.0 computed from them (expected*.npz).
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.tokens.cache_reader import TokenCache

ARCHIVE = Path(__file__).parent / "golden" / "version_0_1.zip"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The unpacked folder; the cache names its tokenizer by an absolute path, so that is changed."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    path = folder / "tokens" / "cache.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"tokenizer_path": str(folder / "tokenizer")}))
    return folder


@pytest.fixture(scope="module")
def expected(old):
    return np.load(old / "expected.npz")


def test_the_transformer_of_a_workdir_samples_the_same_ids(old, expected):
    model = mvar_jax.load(old / "transformer")
    assert model.classes.find("stripes_3") == 3
    _, ids_BL = model.sample([3, 8], seed=0, cfg=1.0, top_k=1)
    np.testing.assert_array_equal(ids_BL, expected["ids"])
    np.testing.assert_allclose(model.logits(ids_BL, [3, 8]), expected["logits"], atol=2e-5)


def test_the_best_checkpoint_is_found(old, expected):
    best = mvar_jax.load(old / "transformer", which="best")
    np.testing.assert_allclose(best.logits(expected["ids"], [3, 8]), expected["best_logits"], atol=2e-5)


def test_the_tokenizer_of_a_workdir_encodes_the_same_ids(old, expected):
    ids_BL = mvar_jax.load(old / "tokenizer").encode(expected["image"])
    np.testing.assert_array_equal(ids_BL, expected["image_ids"])


def test_the_token_cache_reads_the_same_records(old):
    cache, expected = TokenCache(old / "tokens", "train"), np.load(old / "expected_tokens.npz")
    for i, (ids, label) in enumerate(zip(expected["ids"], expected["label"], strict=True)):
        np.testing.assert_array_equal(cache[i]["ids"], ids)
        assert cache[i]["label"] == label


def test_training_resumes_and_the_cache_is_found_complete(old, capfd, monkeypatch):
    monkeypatch.chdir(old)
    config = ["--config", "debug_transformer", "--config.data.cache=tokens"]
    assert main(["cache_tokens", *config, "--tokenizer", "tokenizer", "--out", "tokens"]) == 0
    assert "already complete" in capfd.readouterr().out
    # num_steps decides what is learned, so a finished run stays finished; without its last evaluation it resumes
    lines = (old / "transformer" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (old / "transformer" / "metrics.jsonl").write_text("".join(line for line in lines if '"eval"' not in line))
    flags = ["--config.num_steps=4", "--config.keep_checkpoints=1", "--config.keep_best=loss"]
    assert main(["train", *config, *flags, "--workdir", "transformer"]) == 0
    assert "resuming from step 4 of 4" in capfd.readouterr().out
