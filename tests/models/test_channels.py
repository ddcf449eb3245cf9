"""Images of one channel (grey) and of four (RGBA): from the data through training to files."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image
from small_case import TINY_MODULES, seeded_params, shapes_of

from mvar_jax import build
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import fingerprint, module_from_dict, module_to_dict, save_model
from mvar_jax.cli.configuration import read_config
from mvar_jax.data.transforms import CoverTransform, DigitTransform, PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.evaluation.features import check_pixels
from mvar_jax.files.images import save_png, side_by_side, tile_columns
from mvar_jax.models.lpips import Lpips, lpips_loss, shapes
from mvar_jax.ops.pixels import MODES, check_scored
from mvar_jax.training.codebook_options import CodebookOptions

MODEL = TINY_MODULES["tokenizer"]
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 9, 4), np.uint8)  # RGBA


def png_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("transform", [PhotoTransform(9, flip=True), CoverTransform(9, 9)])
def test_a_photo_has_the_channels_that_are_asked_for(transform, channels):
    pixels = dataclasses.replace(transform, channels=channels)(png_of(PHOTO))
    wanted = np.asarray(Image.fromarray(PHOTO).convert(MODES[channels]))[1:10].reshape(9, 9, channels)
    np.testing.assert_array_equal(pixels, wanted)


def test_digits_are_grey_and_opaque():
    rgb, grey, rgba = (DigitTransform(8, channels=n)(np.eye(8, dtype=np.float32)) for n in (3, 1, 4))
    np.testing.assert_array_equal(np.repeat(grey, 3, axis=-1), rgb)
    np.testing.assert_array_equal(rgba, np.dstack([rgb, np.full((8, 8), 255)]))


@pytest.mark.parametrize("channels", MODES)
def test_files_and_grids_have_the_mode_of_the_images(tmp_path, channels):
    pixels = PHOTO[None, ..., 4 - channels :]
    for image in (pixels[0], side_by_side(pixels, pixels, 1), tile_columns({"input": pixels})):
        save_png(tmp_path / "a.png", image)
        with Image.open(tmp_path / "a.png") as file:
            assert file.mode == MODES[channels]
            np.testing.assert_array_equal(np.asarray(file).reshape(image.shape), image)


def test_a_model_file_without_channels_has_three_and_its_fingerprint_stays():
    fields = module_to_dict(MODEL)
    assert fields.pop("channels") == 3
    old = module_from_dict("tokenizer", fields)
    assert old == MODEL
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes_of(MODEL))
    assert fingerprint(MODEL, params) == "dcab5c8de17c5a5f5b0676ad038f6742"


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(InputError, match=r"channels must be 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\), got 2"):
        MODEL.clone(channels=2).check()


def test_lpips_and_inception_see_grey_three_times_and_refuse_alpha():
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(-1, 1, (1, 16, 16, 1)).astype(np.float32) for _ in range(2))
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes())
    colour = Lpips().apply({"params": params}, a.repeat(3, -1), b.repeat(3, -1)).mean()
    np.testing.assert_array_equal(lpips_loss(params, a, b), colour)
    assert check_pixels(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 8, 8, 3)
    CodebookOptions(perceptual_weight=1.0).check_images((64, 64, 1))
    with pytest.raises(InputError, match="perceptual_weight must be 0 unless images have .* no alpha"):
        CodebookOptions(perceptual_weight=1.0).check_images((64, 64, 4))
    with pytest.raises(InputError, match="config.eval_inception needs a tokenizer of images of 1 or 3 channels"):
        check_scored(4, "config.eval_inception")


def test_a_tokenizer_of_four_channels_trains_against_a_discriminator_and_shows_them():
    own = {"batch_size": 2, "num_steps": 2, "data.image_size": 6, "data.size": 2}
    own |= {"model.channels": 4, "model.sides": "(6,)", "model.ch": 4}
    own |= {"codebook.warmup_steps": 0, "codebook.revive_every_steps": 0, "optimizer.warmup_steps": 1}
    lines = [f"--config.{key}={value}" for key, value in own.items()]
    config = read_config("debug", lines) | {"adversary": {"kind": "patch", "layers": 1, "width": 4}}
    task = build.build_task(config)[0]
    batch, state = next(task.batches(0)), task.init_state()
    assert batch["image"].shape == (2, 6, 6, 4)
    before = jax.device_get(state.params["decoder"]["conv_out"]["kernel"])
    state, metrics = task.train_step(state, batch, 0)
    assert not metrics["is_bad"] and before.shape[3] == 4
    assert (before != np.asarray(state.params["decoder"]["conv_out"]["kernel"])).any(axis=(0, 1, 2)).all()
    assert {name: x.shape[2] for name, x in task.pictures(state).items()} == {"reconstructions": 4, "scales": 4}


def test_reconstruct_writes_grey_images_with_a_grey_model(tmp_path):
    model = MODEL.clone(channels=1)
    save_model(tmp_path / "model", {"tokenizer": model}, {"tokenizer": seeded_params(model)})
    Image.fromarray(PHOTO[:, :8].repeat(2, 0).repeat(2, 1)).save(tmp_path / "photo.png")
    line = ["reconstruct", "--checkpoint", str(tmp_path / "model"), "--images", str(tmp_path / "photo.png")]
    assert main([*line, "--size", "12x12", "--out", str(tmp_path / "out")]) == 0
    for name in ("000000_photo.png", "reconstructions.png"):
        with Image.open(tmp_path / "out" / name) as file:
            assert file.mode == "L"
    with np.load(tmp_path / "out/reconstructions.npz") as file:
        assert file["arr_0"].shape == (1, 12, 12, 1)
