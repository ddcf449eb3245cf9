"""The `edit` command: the files it writes, and the input it refuses."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import noise
from PIL import Image
from test_bad_input import refuse

import mvar_jax.api
from mvar_jax.__main__ import main
from mvar_jax.cli.edit import draw_results


@pytest.fixture(scope="module")
def loaded_once():
    """Load each model once, since loading takes most of the time of a refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvar_jax.api, "load", functools.cache(mvar_jax.api.load))
        yield


@pytest.fixture
def files(tmp_path):
    """image.png (8 x 6) and mask.png, white on its right half."""
    Image.fromarray(noise(8, 6)).save(tmp_path / "image.png")
    mask = np.zeros((6, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_results_are_drawn_a_batch_at_a_time():
    """No more than --batch_size at once, in batches of one shape, the next one when the last one is written."""
    drawn = []

    def edit_squares(squares, labels, seed, options, softness, rows):
        drawn.append((labels.tolist(), rows.tolist()))
        return np.zeros((len(labels), 6, 6, 3)), None

    model, args = SimpleNamespace(edit_squares=edit_squares), SimpleNamespace(batch_size=3, seed=0, softness=0.5)
    results = draw_results(model, None, np.array([5, 5, 5, 5, 7, 7, 7]), None, args)
    next(results)
    assert drawn == [([5, 5, 5], [0, 1, 2])]
    assert len(list(results)) == 6
    assert drawn[1:] == [([5, 7, 7], [3, 4, 5]), ([7, 7, 7], [6, 6, 6])]


def test_edit_changes_the_masked_pixels_alone(tiny_model, quick_programs, files):
    """The command writes one PNG per result and a grid, keeps known pixels, and samples what `Model.edit` samples.

    The image is not square: results have its size. Equality with the Python API shows that every option arrives;
    --expand must keep the shrunk image's pixels.
    """
    base = ["edit", "--checkpoint", str(tiny_model), "--image", str(files / "image.png"), "--label", "0,2"]
    options = ["--num", "2", "--seed", "5", "--cfg", "1.0", "--top_k", "12", "--temperature", "3"]
    assert main([*base, *options, "--mask", str(files / "mask.png"), "--out", str(files / "in")]) == 0
    assert sorted(path.name for path in (files / "in").iterdir()) == [
        *(f"00000{i}.png" for i in range(4)),
        "edits.json",
        "grid.png",
    ]
    after = np.stack([np.asarray(Image.open(files / "in" / f"00000{i}.png")) for i in range(4)])
    before = noise(8, 6)
    np.testing.assert_array_equal(after[:, :, :4], before[None, :, :4].repeat(4, 0))
    assert (after[:, :, 4:] != before[:, 4:]).any(axis=(1, 2, 3)).all()
    assert Image.open(files / "in" / "grid.png").size == (2 + 4 * 98, 2 + 2 * 98)

    mask = np.asarray(Image.open(files / "mask.png"))
    model = mvar_jax.load(str(tiny_model))
    images, ids = model.edit(before[None], mask, [0, 0, 2, 2], seed=5, cfg=1.0, top_k=12, temperature=3.0)
    np.testing.assert_array_equal(np.rint((images + 1) * 127.5), after)

    inverted = [*base, *options, "--mask", str(files / "inverted.png"), "--invert", "--batch_size", "3"]
    Image.fromarray(255 - mask).save(files / "inverted.png")
    assert main([*inverted, "--out", str(files / "again")]) == 0
    again = np.stack([np.asarray(Image.open(files / "again" / f"00000{i}.png"), int) for i in range(4)])
    assert np.abs(again - after).max() <= 1, "batches of 3 and 1 give other results than one of 4"
    assert (files / "again" / "grid.png").read_bytes() == (files / "in" / "grid.png").read_bytes()

    before = before[:, 1:7]  # the middle square
    assert main([*base, *options, "--expand", "2", "--out", str(files / "out")]) == 0
    outer = np.stack([np.asarray(Image.open(files / "out" / f"00000{i}.png")) for i in range(4)])
    small = np.asarray(Image.fromarray(before).resize((3, 3), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(outer[:, 1:4, 1:4], small[None].repeat(4, 0))
    assert len(np.unique(outer.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mask", "small.png"], ["--mask must have the image's size, 8 x 6 pixels, got 12 x 9 pixels"]),
        (["--mask", "black.png"], ["mask must mark some pixels to draw", "but marks none"]),
        (["--mask", "white.png"], ["mask must leave some pixels as they are", "use sample instead"]),
        (["--mask", "white.png", "--invert"], ["inverted mask must mark some pixels to draw"]),
        (["--mask", "wide.png"], ["mask must draw at most 6 x 6 pixels", "8 x 6 pixels, got 8 x 1 pixels"]),
        (["--expand", "2", "--invert"], ["--invert needs --mask"]),
        (["--mask", "mask.png", "--batch_size", "0"], ["--batch_size must be 1 or more, got 0"]),
        (["--mask", "broken.png"], ["mask", "broken.png"]),
        (["--mask", "mask.png", "--image", "broken.png"], ["image", "broken.png"]),
        (["--mask", "mask.png", "--expand", "2"], ["exactly one of --mask and --expand", "both"]),
        ([], ["exactly one of --mask and --expand", "neither"]),
        (["--expand", "0.5"], ["expand must be", "above 1", "got 0.5"]),
        (["--mask", "mask.png", "--label", "ten"], ["labels", "'ten'"]),
        (["--mask", "mask.png", "--label", "10"], ["labels must be class numbers from 0 to 2, got 10"]),
        (["--mask", "mask.png", "--border", "-1"], ["border must be 0 pixels or more, got -1"]),
        (["--mask", "mask.png", "--softness", "2"], ["softness must be", "got 2.0"]),
        (["--mask", "mask.png", "--num", "1" + 22 * "0"], ["num must be from 1 to", "got 1" + 22 * "0"]),
        (["--mask", "mask.png", "--num", "0"], ["--num must be 1 or more, got 0"]),
        (["--mask", "mask.png", "--seed", "-1"], ["seed must be", "got -1"]),
        (["--mask", "mask.png", "--cfg", "1e39"], ["cfg must be", "got 1e+39"]),
    ],
)
def test_edit_refuses_what_does_not_fit(tiny_model, loaded_once, files, capfd, monkeypatch, flags, words):
    monkeypatch.chdir(files)
    Image.new("L", (12, 9), 255).save("small.png")
    Image.new("L", (8, 6), 0).save("black.png")
    Image.new("L", (8, 6), 255).save("white.png")
    Image.fromarray(np.uint8(255) * (np.arange(6) == 2)[:, None].repeat(8, 1)).save("wide.png")
    (files / "broken.png").write_bytes(b"not a png")
    base = ["edit", "--checkpoint", str(tiny_model), "--image", "image.png", "--label", "1", "--out", "out"]
    refuse(capfd, [*base, *flags], *words)
    assert not (files / "out").exists()
