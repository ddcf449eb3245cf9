"""The report of a run on the digits, as far as it reads the run's own files: a tiny model and few images."""

import json

import numpy as np
import pytest
import small_case

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.digits import measure_run
from mvar_jax.digits.measure_run import Drawn, load_digits, report_digits

SIDES, NUM = (1, 8), 20
DATA = {"source": "digits", "image_size": 16, "split_seed": 0, "val_fraction": 0.2}


def save_run(root, channels: int = 3, seed: int = 0):
    """Write what a run of 16 x 16 pixels leaves, and its samples in `samples`; return the folder."""
    modules = {kind: module.clone(sides=SIDES) for kind, module in small_case.TINY_MODULES.items()}
    modules["tokenizer"] = modules["tokenizer"].clone(channels=channels)
    modules["transformer"] = modules["transformer"].clone(num_classes=10)
    save_model(root, modules, {kind: small_case.seeded_params(module, seed) for kind, module in modules.items()})
    (root / "config.json").write_text(json.dumps({"data": DATA}))
    evaluated = {"kind": "eval", "step": 1, "loss": 1.0, "loss_per_scale": [1.0, 1.0]}
    evaluated |= {"psnr_db": 20.0, "codebook_used_percent": [10.0, 20.0]}
    lines = [evaluated, {"kind": "train", "step": 1, "loss": 1.0}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def draw_samples(root, out, *more: str) -> None:
    line = ["sample", "--checkpoint", str(root), "--labels=0-9", "--num=2", "--out", str(out)]
    assert main([*line, *more]) == 0


@pytest.fixture
def quick(monkeypatch):
    """Few images, and no grid of samples."""
    read = measure_run.load_digits
    few = lambda *args: {split: (x[:60], labels[:60]) for split, (x, labels) in read(*args).items()}
    monkeypatch.setattr(measure_run, "load_digits", few)
    monkeypatch.setattr(measure_run, "sample_grid", lambda model, seed: np.zeros((9, 9, 3), np.uint8))


def test_the_digits_have_the_channels_of_the_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": DATA}))
    grey, rgb = (load_digits(tmp_path, channels)["val"][0] for channels in (1, 3))
    np.testing.assert_array_equal(np.repeat(grey, 3, axis=-1), rgb)


@pytest.mark.filterwarnings("ignore:a Frechet distance of")  # there are too few images for one
def test_a_run_of_grey_digits_is_reported(tmp_path, quick):
    root = save_run(tmp_path / "run", channels=1)
    draw_samples(root, tmp_path / "samples", "--save_tokens")
    report_digits(root, Drawn(root, tmp_path / "samples"), None, {}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["figures"]["num_samples"] == NUM


def refusal_of(capfd, root, samples, out) -> str:
    """Return what `report` says, after it has refused before it computes."""
    stages = out.with_suffix(".json")
    stages.write_text("{}")
    line = ["report", f"--transformer={root}", f"--tokenizer={root}", f"--samples={samples}", f"--stages={stages}"]
    capfd.readouterr()
    assert main([*line, f"--out={out}"]) == 2
    assert not (out / "samples.png").exists()
    return capfd.readouterr().err


def test_samples_of_another_model_or_without_tokens_are_refused(tmp_path, capfd):
    root, other = save_run(tmp_path / "run"), save_run(tmp_path / "other", seed=1)
    draw_samples(other, tmp_path / "samples", "--save_tokens")
    error = refusal_of(capfd, root, tmp_path / "samples", tmp_path / "out")
    assert "must hold samples of the last checkpoint of" in error and "draw them again" in error
    draw_samples(root, tmp_path / "bare")
    error = refusal_of(capfd, root, tmp_path / "bare", tmp_path / "out")
    assert "must be a finished folder of `mvar sample --save_tokens`, but has no tokens.npz" in error


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16"), ("--precision", "exact")])
def test_samples_of_any_dtype_are_those_of_their_run(tmp_path, more):
    root = save_run(tmp_path / "run")
    draw_samples(root, tmp_path / "samples", "--save_tokens", *more)
    Drawn(root, tmp_path / "samples").check_samples(mvar_jax.load(root).networks)
