"""Models in an object store: loaded, edited with, and converted there, with no local folder of that name."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import small_case
from PIL import Image
from store_case import contents

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.files.atomic import write_json
from mvar_jax.files.directories import upload_folder
from mvar_jax.files.paths import as_path

pytestmark = pytest.mark.usefixtures("empty_folder")

PUBLISHED = Path(__file__).parents[1] / "golden" / "tiny"


@pytest.fixture(scope="module")
def stored_model(s3):
    """The tiny model, written to a store as a model directory."""
    folder = as_path(s3.url) / "tiny_model"
    save_model(folder, small_case.TINY_MODULES, small_case.tiny_params())
    write_json(folder / "classes.json", ["ant", "bee", "cat"])
    return str(folder)


def image_file(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def test_model_in_a_store_is_the_model_on_a_disk(stored_model, tiny_model):
    stored, local = mvar_jax.load(stored_model), mvar_jax.load(tiny_model)
    assert stored.classes.names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(stored.sample([0, 1], seed=3)[1], local.sample([0, 1], seed=3)[1])


def test_images_in_a_store_are_edited_and_reconstructed_into_it(s3, stored_model, tmp_path):
    folder, outs = as_path(s3.url) / "photos", [f"{s3.url}/edited", f"{s3.url}/reconstructed"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        image_file(photos / name)
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 6, axis=1).repeat(12, axis=0)).save(tmp_path / "mask.png")
    upload_folder(photos, folder)
    (folder.parent / "mask.png").upload(tmp_path / "mask.png")
    edit = ["edit", f"--checkpoint={stored_model}", "--label=bee", "--num=1"]
    assert main([*edit, f"--image={folder}/a.png", f"--mask={s3.url}/mask.png", f"--out={outs[0]}"]) == 0
    larger = small_case.TOKENIZER.clone(sides=(1, 6))  # 12 x 12 pixels
    save_model(as_path(f"{s3.url}/larger"), {"tokenizer": larger}, {"tokenizer": small_case.seeded_params(larger)})
    assert main(["reconstruct", f"--checkpoint={s3.url}/larger", f"--images={folder}", f"--out={outs[1]}"]) == 0
    assert as_path(outs[0]).find() == ["000000.png", "edits.json", "grid.png"]
    own = [f"reconstructions.{suffix}" for suffix in ("json", "npz", "png")]
    assert as_path(outs[1]).find() == ["000000_a.png", "000001_b.png", "psnr.md", *own]
    arrays = np.load(io.BytesIO((as_path(outs[1]) / "reconstructions.npz").read_bytes()))
    assert arrays["arr_0"].shape == (2, 12, 12, 3)


def test_weights_are_converted_from_and_to_a_store(s3, tmp_path, capsys):
    there = as_path(s3.url) / "converted"
    for name in ("vae.pth", "mvar.pth"):
        (there / name).upload(PUBLISHED / name)
    for folder, source in ((tmp_path, PUBLISHED), (there, there)):
        files = [f"--tokenizer={source}/vae.pth", f"--transformer={source}/mvar.pth"]
        assert main(["convert", *files, f"--out={folder}/model"]) == 0
        assert main(["convert", f"--checkpoint={folder}/model", f"--to_torch={folder}/torch"]) == 0
    assert contents(there / "torch") == contents(tmp_path / "torch") and len(contents(there / "torch")) == 2
    safe = [f"--to_safetensors={there}/safe", "--shard_mib=1"]
    assert main(["convert", f"--checkpoint={there}/model", *safe]) == 0
    index = f"--transformer={there}/safe/mvar.safetensors.index.json"
    assert main(["convert", index, f"--out={there}/again"]) == 0
    fields = [json.loads((there / name / "model.json").read_text())["transformer"] for name in ("model", "again")]
    assert fields[0] == fields[1]
    assert main(["convert", *files, f"--out={there}/model"]) == 2
    assert "--out must be a new or an empty directory" in capsys.readouterr().err
