"""`evaluate` on images of several kinds and on few samples of a model, with a stand-in for the Inception network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from PIL import Image
from test_evaluate import REFERENCES, SAMPLES, evaluate, narrow, refusal_of, save_pngs  # noqa: F401 (a fixture)

from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.evaluation.reference import read_reference
from mvar_jax.evaluation.report import SAMPLE_SCORES
from mvar_jax.sampling import bulk


def test_grey_images_are_scored_as_those_of_three_equal_channels():
    """As samples, and as a reference that is saved; `sample` of a grey model writes such files."""
    for name, images in (("samples", SAMPLES), ("reference", REFERENCES)):
        np.savez(f"grey_{name}.npz", arr_0=images[..., :1])
        np.savez(f"rgb_{name}.npz", arr_0=np.repeat(images[..., :1], 3, axis=-1))
    grey, rgb = (
        evaluate("--samples", f"{x}_samples.npz", "--reference", f"{x}_reference.npz", *saving, out=x)
        for x, saving in (("grey", ["--save_reference", "saved.npz"]), ("rgb", []))
    )
    assert {name: grey[name] for name in SAMPLE_SCORES} == {name: rgb[name] for name in SAMPLE_SCORES}
    assert len(read_reference("saved.npz").images) == 60


def test_pngs_with_opaque_alpha_are_scored():
    save_pngs("opaque", [np.dstack([x, np.full((6, 6), 255, np.uint8)]) for x in SAMPLES])
    save_pngs("pngs", SAMPLES)
    assert evaluate("--samples", "opaque")["fid"] == evaluate("--samples", "pngs", out="again")["fid"]


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_model_of_images_with_alpha_is_refused_before_it_draws(command, tmp_path, monkeypatch, capsys):
    tokenizer = small_case.TINY_MODULES["tokenizer"].clone(channels=4)
    modules = small_case.TINY_MODULES | {"tokenizer": tokenizer}
    save_model(
        tmp_path / "rgba", modules, {kind: small_case.seeded_params(module) for kind, module in modules.items()}
    )
    monkeypatch.setattr(bulk, "sample", None)
    line = [command, "--checkpoint", "rgba", "--reference", "reference.npz", "--inception", "x.npz", "--out", "out"]
    assert main([*line, "--num_samples", "9"]) == 2
    assert "needs a tokenizer of images of 1 or 3 channels, got 4" in capsys.readouterr().err
    assert not Path("out").exists()


def test_few_samples_of_a_model_are_spread_over_its_classes_with_a_warning(tmp_path, monkeypatch, capsys):
    transformer = small_case.TINY_MODULES["transformer"].clone(num_classes=10)
    modules = small_case.TINY_MODULES | {"transformer": transformer}
    save_model(
        tmp_path / "ten", modules, {kind: small_case.seeded_params(module) for kind, module in modules.items()}
    )
    drawn = []

    def draw(networks, labels_B, keys_B, options, outputs):
        drawn.extend(np.asarray(labels_B).tolist())
        return (jnp.asarray(SAMPLES[: len(labels_B)]),)

    monkeypatch.setattr(bulk, "sample", draw)
    found = evaluate("--checkpoint", "ten", "--num_samples", "5", "--scores", "inception_score")
    assert drawn == [0, 2, 4, 6, 8]
    assert "the labels are 5 of the model's 10 classes" in found["warnings"][0]
    assert "the labels are 5 of the model's 10 classes" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["samples.json", "edits.json"])
def test_the_grid_in_a_folder_of_ours_is_no_reference_image(options, capsys):
    save_pngs("drawn/deep", REFERENCES[:20])
    for folder in ("drawn/deep/a", "drawn/deep/b"):
        Path(folder, options).write_text("{}")
        Image.fromarray(SAMPLES[0]).save(f"{folder}/grid.png")
    found = evaluate("--reference", "drawn")
    assert found["settings"]["reference"]["statistics"] == "of 20 images"
    assert "drawn: 2 files left out, which show several images or curves: deep/a/grid.png" in capsys.readouterr().out
    if options == "edits.json":
        assert evaluate("--samples", "drawn", out="samples")["settings"]["samples"]["num_samples"] == 20
        assert "drawn: 2 files left out" in capsys.readouterr().out


def test_an_image_that_is_called_as_a_grid_counts_in_a_folder_of_other_origin():
    save_pngs("pngs", REFERENCES[:20])
    Image.fromarray(SAMPLES[0]).save("pngs/a/grid.png")
    assert evaluate("--reference", "pngs")["settings"]["reference"]["statistics"] == "of 21 images"


def test_reconstructions_side_by_side_are_no_reference(capsys):
    save_pngs("rebuilt", REFERENCES[:3])
    for path in Path("rebuilt").glob("*/*.png"):
        path.rename(f"rebuilt/000{path.stem}_x.png")
    Path("rebuilt/reconstructions.json").write_text("{}")
    error = refusal_of(capsys, "--reference", "rebuilt")
    assert "its images show several side by side; give reconstructions.npz" in error
