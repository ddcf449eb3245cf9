"""Images that are not square, or of another size than a tokenizer was trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from PIL import Image
from small_case import TOKENIZER, seeded_params

from mvar_jax.__main__ import main
from mvar_jax.api import Model
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.data.transforms import CoverTransform, PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.quantize import phi_index
from mvar_jax.ops.resize import area_matrix, bicubic_matrix
from mvar_jax.scales import extend_sides

PARAMS = seeded_params(TOKENIZER)
MODEL = Model(Networks(TOKENIZER, PARAMS))
WIDE = MODEL.for_images(8, 14)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 14, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("last", "expected"),
    [(16, (1, 2, 5, 16)), (32, (1, 2, 5, 16, 24, 32)), (40, (1, 2, 5, 16, 24, 32, 40)), (4, (1, 2, 4))],
)
def test_sides_are_cut_or_extended(last, expected):
    assert extend_sides((1, 2, 5, 16), last) == expected


def test_a_model_of_one_scale_samples_and_scores():
    sizes = {"sides": (4,), "refine_step": 1}
    tokenizer, transformer = TOKENIZER.clone(sides=(4,)), small_case.MODEL.clone(**sizes)
    params = seeded_params(transformer)
    model = Model(Networks(tokenizer, seeded_params(tokenizer), transformer, params))
    ids = model.sample([0, 1])[1]
    logits = model.logits(ids, [0, 1])
    assert logits.shape == (2, 16, 16) and "word_embed" not in params
    logs = jax.nn.log_softmax(logits)
    expected = -np.take_along_axis(np.asarray(logs), np.asarray(ids)[..., None], 2)[..., 0].sum(1, keepdims=True)
    np.testing.assert_allclose(model.score(ids, [0, 1]), expected, rtol=1e-5)


def test_the_own_size_gives_the_own_tokenizer():
    assert MODEL.for_images(10, 10).tokenizer == TOKENIZER


def test_maps_follow_the_shape_of_the_images():
    assert WIDE.tokenizer.sides == ((1, 2), (2, 4), (4, 7))
    assert MODEL.for_images(14, 8).tokenizer.sides == ((2, 1), (4, 2), (7, 4))
    assert MODEL.for_images(20, 20).tokenizer.sides == (1, 2, 4, 5, 7, 10)


def test_a_tokenizer_of_another_shape_gives_further_ones():
    assert WIDE.for_images(14, 8).tokenizer == MODEL.for_images(14, 8).tokenizer


@pytest.mark.parametrize("of", [np.array, jnp.array, list])
def test_sides_of_any_library_are_the_same(of):
    sides = MODEL.for_images(10, 10, of([1, 2, 5])).tokenizer.sides
    assert sides == (1, 2, 5) and {*map(type, sides)} == {int}


def test_ids_and_f_hat_equal_a_plain_loop():
    """Residuals, nearest codes and f_hat by numpy in float64, with phi's convolution as shifted sums."""
    tokenizer, codebook = WIDE.tokenizer, np.asarray(PARAMS["codebook"], np.float64)
    f = np.asarray(tokenizer.apply({"params": PARAMS}, IMAGES, method="features"), np.float64)
    rest, f_hat, ids = f, np.zeros_like(f), []
    resize = lambda matrix, x, rows, columns: np.einsum(
        "iy,jx,byxc->bijc", matrix(x.shape[1], rows), matrix(x.shape[2], columns), x, dtype=np.float64
    )
    for scale, (rows, columns) in enumerate(tokenizer.sides):
        pooled = resize(area_matrix, rest, rows, columns)
        ids.append(((pooled[..., None, :] - codebook) ** 2).sum(-1).argmin(-1))
        codes = resize(bicubic_matrix, codebook[ids[-1]], 4, 7)
        conv = PARAMS[f"phi_convs_{phi_index(3, 2)[scale]}"]
        padded = np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = np.asarray(conv["kernel"], np.float64)
        shifted = sum(padded[:, i : i + 4, j : j + 7] @ kernel[i, j] for i in range(3) for j in range(3))
        update = 0.5 * codes + 0.5 * (shifted + np.asarray(conv["bias"]))
        f_hat, rest = f_hat + update, rest - update
    ours = WIDE.encode(IMAGES)
    np.testing.assert_array_equal(ours, np.concatenate([x.reshape(2, -1) for x in ids], axis=1))
    last = tokenizer.apply({"params": PARAMS}, ours, method="f_hats")[-1]
    np.testing.assert_allclose(last, f_hat, atol=1e-4)
    images = WIDE.decode(ours)
    assert images.shape == IMAGES.shape and np.isfinite(images).all()


def test_a_tall_image_is_not_the_wide_one():
    assert MODEL.for_images(14, 8).encode(IMAGES.swapaxes(1, 2)).shape == WIDE.encode(IMAGES).shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9, 14), "height must be a multiple of 2 pixels, by which the tokenizer reduces images, got 9"),
        ((8, 1), "width must be a multiple of 2 pixels"),
        ((8, 14, (1, 3)), r"sides must be a list that ends at 4, the shorter edge of 8 x 14 images, got \(1, 3\)"),
    ],
)
def test_sizes_that_the_tokenizer_cannot_take_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        MODEL.for_images(*arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"images must be an array \[B, 8, 14, 3\]"):
        WIDE.encode(jax.numpy.zeros((1, 10, 10, 3)))


def test_reconstruct_cuts_images_to_the_size_that_is_asked_for(tmp_path, capfd):
    save_model(tmp_path / "model", {"tokenizer": TOKENIZER}, {"tokenizer": PARAMS})
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    line = ["reconstruct", "--checkpoint", str(tmp_path / "model"), "--images", str(tmp_path / "photo.png")]
    for size, words in (("8", "--size must be HEIGHTxWIDTH"), ("9x14", "height must be a multiple of 2")):
        assert main([*line, "--out", str(tmp_path / "out"), "--size", size]) == 2
        assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*line, "--out", str(tmp_path / "out"), "--size", "12x14", "--save_tokens"]) == 0
    with np.load(tmp_path / "out/reconstructions.npz") as file:
        assert file["arr_0"].shape == (1, 12, 14, 3)


@pytest.mark.parametrize("shape", [(40, 50), (9, 30), (6, 6)])
def test_a_square_size_is_cut_as_in_training(shape):
    photo = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(CoverTransform(8, 8)(photo), PhotoTransform(8, flip=False)(photo))
