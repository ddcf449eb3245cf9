"""`evaluate` started again: after a kill, with a file that is gone, or with other images under the same names."""

import argparse
from pathlib import Path

import narrow_network
import numpy as np
import pytest
from PIL import Image

from mvar_jax.__main__ import main
from mvar_jax.cli import evaluate, sweep
from mvar_jax.evaluation import features, report
from mvar_jax.evaluation.reference import read_reference

SAMPLES, REFERENCES = np.random.default_rng(0).integers(0, 256, (2, 40, 6, 6, 3)).astype(np.uint8)
SAVING = ("--reference", "reference.npz", "--save_reference", "stored.npz")


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    narrow_network.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", arr_0=REFERENCES)
    save_images("samples", SAMPLES)


def save_images(folder: str, images) -> None:
    """Write images without compression, so that all files have the same number of bytes."""
    Path(folder).mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{folder}/{i:03d}.bmp")


def run(*args, samples="samples") -> int:
    return main(["evaluate", "--samples", samples, "--inception", "x.npz", "--out", "out", *args])


@pytest.mark.parametrize(("folder", "reference"), [("samples", "reference.npz"), ("references", "references")])
def test_other_images_under_the_same_names_are_not_taken_for_the_scored_ones(capsys, folder, reference):
    save_images("references", REFERENCES)
    assert run("--reference", reference) == 0
    save_images(folder, SAMPLES[::-1])
    assert run("--reference", reference) == 2
    assert "differs from" in (error := capsys.readouterr().err) and "choose another --out" in error


def test_a_kill_between_the_saved_reference_and_the_scores_is_continued(monkeypatch, capsys):
    def die(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_atomically", die)
        assert run(*SAVING) == 130
    assert Path("stored.npz").exists() and not Path("out/evaluation.json").exists()
    assert run(*SAVING) == 0
    assert Path("out/evaluation.json").exists() and len(read_reference("stored.npz").images) == 40
    assert not Path("out/unfinished").exists()


def test_a_saved_reference_that_is_gone_is_written_again(capsys):
    assert run(*SAVING) == 0
    scores, stored = Path("out/evaluation.json").read_bytes(), Path("stored.npz").read_bytes()
    Path("stored.npz").unlink()
    capsys.readouterr()
    assert run(*SAVING) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["out/evaluation.json: already there", "stored.npz: written"]
    assert Path("stored.npz").read_bytes() == stored and Path("out/evaluation.json").read_bytes() == scores
    assert run(*SAVING) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "stored.npz: already there"


@pytest.mark.parametrize(
    ("file", "words"), [("stored.npy", "got stored.npy"), ("there.npz", "there.npz, which exists")]
)
def test_a_file_that_cannot_be_saved_to_is_refused_before_anything_is_read(capsys, file, words):
    Path("there.npz").write_bytes(b"somebody else's")
    assert run("--reference", "none.npz", "--save_reference", file, samples="none.npz") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --save_reference must be a new file that ends in .npz") and words in error
    assert not Path("out").exists() and Path("there.npz").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("command", [evaluate, sweep])
def test_the_help_names_the_default_batches_of_the_network(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    text = next(action.help for action in parser._actions if action.dest == "inception_batch")
    assert f"default {features.ACCELERATOR_BATCH_SIZE}, on a CPU {features.BATCH_SIZES['cpu']}" in text
