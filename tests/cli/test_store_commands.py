"""Commands whose paths are an object store's: the same files as on a disk, and no local folder of that name."""

import json
import os

import numpy as np
import pytest
from store_case import contents

from mvar_jax.__main__ import main
from mvar_jax.files.directories import upload_folder
from mvar_jax.files.locks import acquire
from mvar_jax.files.paths import as_path
from mvar_jax.processes.holding import hold
from mvar_jax.sampling import bulk
from mvar_jax.sampling.sampler import SampleOptions

pytestmark = pytest.mark.usefixtures("empty_folder")

SAMPLE = ["sample", "--labels=0-2", "--num=2", "--batch_size=4", "--save_tokens", "--compilation_cache=off"]


def test_samples_in_a_store_are_those_on_a_disk_and_are_kept(store, tiny_model, tmp_path, capsys):
    local, stored = tmp_path / "local", as_path(f"{store.url}/samples")
    for out in (local, stored):
        assert main([*SAMPLE, f"--checkpoint={tiny_model}", f"--out={out}"]) == 0
    assert contents(stored) == contents(local) and len(contents(local)) == 6 + 4
    assert stored.find() == sorted(contents(local)), "neither unfinished batches nor a lease are left"
    capsys.readouterr()
    assert main([*SAMPLE, f"--checkpoint={tiny_model}", f"--out={stored}"]) == 0
    assert "already there" in capsys.readouterr().out
    assert main([*SAMPLE, "--seed=1", f"--checkpoint={tiny_model}", f"--out={stored}"]) == 2
    assert "differs from 0, used for the samples" in capsys.readouterr().err


def test_damaged_batches_in_a_store_are_drawn_again(store):
    """A batch counts as finished if all of its bytes are right, in a store as on a disk."""
    out = as_path(f"{store.url}/damaged_batches")
    batches = bulk._Batches(bulk.Order((0,), 2, SampleOptions(), batch_size=1), out)
    for batch in range(2):
        batches.write(batch, {"pixels": np.full((1, 6, 6, 3), batch, np.uint8)})
    assert batches.find_finished(range(2)) == {0, 1}
    data = batches.file(1).read_bytes()
    batches.file(1).write_bytes(data.replace(bytes([1] * 50), bytes(50), 1))
    assert batches.find_finished(range(2)) == {0}


def test_data_in_a_store_are_surveyed_into_it(s3, tmp_path):
    from image_files import write_tree

    url = f"{s3.url}/survey"
    upload_folder(write_tree(tmp_path / "tree"), as_path(url) / "images")
    options = ["--config=debug", "--config.data.source=folder", f"--config.data.path={url}/images"]
    options += ["--config.data.size=0", "--config.data.split_seed=0"]
    assert main(["data", *options, f"--out={url}/report"]) == 0
    found = json.loads((as_path(url) / "report/data.json").read_text())
    assert found["train"]["num_images"] == 15 and found["train"]["num_bad"] == 0
    assert as_path(f"{url}/report").find() == ["data.json", "train.png", "val.png"]


def test_samples_that_another_program_writes_are_refused(s3, tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("MVAR_LEASE_SECONDS", "6")
    out = as_path(s3.url) / "held_samples"
    lock = acquire(out, "out")
    try:
        assert main([*SAMPLE, f"--checkpoint={tiny_model}", f"--out={out}"]) == 2
    finally:
        lock.release()
    assert f"out {out} is in use by another run, process {os.getpid()} on " in capsys.readouterr().err
    assert not out.exists()


def test_missing_bucket_ends_with_one_sentence_and_status_2(s3, tiny_model, capsys):
    assert main([*SAMPLE, f"--checkpoint={tiny_model}", "--out=s3://no-such-bucket/out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "s3://no-such-bucket/out" in lines[0]
    assert main(["sample", "--labels=0", "--checkpoint=s3://no-such-bucket/model", "--out=out"]) == 2
    assert "s3://no-such-bucket/model has no readable model.json" in capsys.readouterr().err


def test_cache_that_another_program_writes_is_refused(run, tmp_path, capsys):
    """On a disk; samples are tried in a store."""
    out = tmp_path / "tokens"
    with hold("out", out):
        assert main([*run.cache, f"--out={out}"]) == 2
        assert f"out {out} is in use by another run, process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert list(out.iterdir()) == []
