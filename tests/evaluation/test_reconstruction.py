"""Reconstructions of many images: what is written, what is left out, and what is held in memory."""

import os
import threading
import weakref

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from mvar_jax.__main__ import main
from mvar_jax.cli import reconstruct as command
from mvar_jax.data.decoding import FORMATS, BadImage
from mvar_jax.errors import RunError
from mvar_jax.evaluation import reconstruction
from mvar_jax.evaluation.reconstruction import Images, write_reconstructions
from mvar_jax.files.images import to_uint8
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.ops.metrics import psnr

SIDE, NUM_TOKENS = 12, 3


class FlatModel:
    """A model whose reconstruction of an image is its mean, which its ids hold; nothing is compiled."""

    tokenizer = Tokenizer((1, SIDE // 4), ch_mult=(1, 1, 1))
    num_tokens = NUM_TOKENS

    def __init__(self, version: int = 0):
        self.tokenizer_params = {"version": np.array(version)}
        self.num_encoded, self.fails_after = 0, 10**6

    def encode(self, images_BYX3):
        if self.num_encoded >= self.fails_after:
            raise RunError("lost")
        self.num_encoded += len(images_BYX3)
        means_B = np.rint((images_BYX3.mean(axis=(1, 2, 3)) + 1) * 127.5)
        return np.repeat(means_B.astype(np.int32)[:, None], NUM_TOKENS, axis=1)

    def decode(self, ids_BL):
        levels_B = np.asarray(ids_BL)[:, 0] / np.float32(127.5) - 1
        return np.broadcast_to(levels_B[:, None, None, None], (len(ids_BL), SIDE, SIDE, 3)).astype(np.float32)


@pytest.fixture
def reconstruct(tmp_path, monkeypatch):
    """(arguments) -> the exit status of the command with a `FlatModel`, or another, on the images of tmp_path/in."""
    (tmp_path / "in").mkdir()
    base = ["reconstruct", "--checkpoint", "none", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]

    def run(*arguments, model=None) -> int:
        monkeypatch.setattr(command, "load_as_asked", lambda args: model or FlatModel())
        return main([*base, *arguments])

    return run


def write_image(path, seed: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(SIDE, SIDE, seed)
    Image.fromarray(pixels).save(path)
    return pixels


class Alive:
    """The number of arrays that are not freed, and the largest it has been."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.Lock()

    def watch(self, array: np.ndarray, num: int = 1) -> np.ndarray:
        """Count an array as `num` images until it is freed."""
        weakref.finalize(array, self._add, -num)
        self._add(num)
        return array

    def _add(self, num: int) -> None:
        with self._lock:
            self.now += num
            self.most = max(self.most, self.now)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """Of three times as many images no more are in memory at a time: those ahead and a few batches.

    Every decoded image, and every batch of images, of reconstructions and of their levels, is watched from its making
    until it is freed.
    """
    monkeypatch.setattr(reconstruction, "GRID_IMAGES", 4)
    monkeypatch.setattr(reconstruction, "NUM_AHEAD", 4)
    monkeypatch.setattr(reconstruction, "NUM_THREADS", 2)

    batches = Images.batches

    def most_alive(num: int) -> int:
        alive, model, names = Alive(), FlatModel(), [f"{i}.png" for i in range(num)]
        model.decode = lambda ids: alive.watch(FlatModel.decode(model, ids), len(ids))
        monkeypatch.setattr(reconstruction, "to_uint8", lambda floats: alive.watch(to_uint8(floats), len(floats)))
        watched = lambda self, size: (alive.watch(batch, len(batch)) for batch in batches(self, size))
        monkeypatch.setattr(Images, "batches", watched)
        images = Images(names, lambda name: alive.watch(noise(SIDE, SIDE, int(name[:-4]))), {})
        (tmp_path / str(num)).mkdir()
        write_reconstructions(model, images, tmp_path / str(num), 4, saves_tokens=True)
        assert np.load(tmp_path / str(num) / "reconstructions.npz")["arr_0"].shape == (num, SIDE, SIDE, 3)
        return alive.most

    assert most_alive(48) < 40
    assert most_alive(144) < 40


def test_sub_folders_and_equal_names_give_results_of_their_own(reconstruct, tmp_path, capsys):
    """Row i of the arrays, PNG i and line i of the table are the same image, in the order of the names."""
    names = ["a/x.png", "a/x.jpg", "b/c/x.PNG", "x.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "in" / name, seed)
    for name in ("notes.txt", ".hidden/x.png", "a/.x.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    assert reconstruct("--save_tokens", "--batch_size", "3") == 0
    out, names = tmp_path / "out", sorted(names)
    found = np.load(out / "reconstructions.npz")["arr_0"]
    ids = np.load(out / "tokens.npz")["ids"]
    assert found.dtype == np.uint8 and ids.dtype == np.int32
    lines = (out / "psnr.md").read_text().splitlines()[2:]
    for i, name in enumerate(names):
        pixels = np.asarray(Image.open(tmp_path / "in" / name))
        assert found[i].min() == found[i].max() == ids[i, 0] and abs(int(found[i, 0, 0, 0]) - pixels.mean()) <= 1
        pair = np.asarray(Image.open(out / f"{i:06d}_x.png"))
        np.testing.assert_array_equal(pair[2:-2:8, 2 : 2 + 8 * SIDE : 8], pixels)
        assert lines[i].startswith(f"| {name} | {psnr(pixels[None], found[i : i + 1], 255.0)[0]:.2f} |")
    assert sorted(path.name for path in out.glob("0*")) == [f"{i:06d}_x.png" for i in range(4)]
    printed = capsys.readouterr().out
    assert "1 of 5 files left out, no images by their names, such as notes.txt\n" in printed
    assert printed.endswith(f"{out}: 4 images\n")


def test_bad_images_are_skipped_counted_and_named(reconstruct, tmp_path, capsys):
    write_image(tmp_path / "in" / "good.png", 0)
    write_image(tmp_path / "in" / "z.png", 1)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"not a jpeg")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    assert reconstruct() == 0
    printed, table = capsys.readouterr().out, (tmp_path / "out" / "psnr.md").read_text()
    assert printed.endswith("2 images, 3 skipped\n")
    for text in (printed, table):
        assert f"broken.jpg: not a {', '.join(FORMATS)} image (10 bytes)\n" in text
        assert "pipe.png: is no file\n" in text and "gone.png: cannot be read: No such file" in text
    assert len(np.load(tmp_path / "out" / "reconstructions.npz")["arr_0"]) == 2
    assert "left out" not in printed


def test_a_folder_without_a_usable_image_is_refused_before_anything_is_written(reconstruct, tmp_path, capsys):
    (tmp_path / "in" / "broken.jpg").write_bytes(b"not a jpeg")
    assert reconstruct() == 2
    words = "--images must hold an image that can be used, got 1 bad in "
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {words}") and "broken.jpg: not a JPEG" in error
    assert not (tmp_path / "out").exists()


def test_results_inside_the_folder_of_images_are_no_images_of_the_next_run(reconstruct, tmp_path, capsys):
    write_image(tmp_path / "in" / "good.png", 0)
    for name in ("first", "first"):
        assert reconstruct("--out", str(tmp_path / "in" / name)) == 0
        assert capsys.readouterr().out.endswith(": 1 images\n")


@pytest.mark.parametrize("damage", ["", "cut", "lost", "not joined"])
def test_a_run_that_was_interrupted_continues_and_leaves_the_same_files(reconstruct, tmp_path, damage, monkeypatch):
    """The third batch of two images failed, or joining all. Whole batches are kept, damaged ones are not."""
    for seed in range(7):
        write_image(tmp_path / "in" / f"{seed}.png", seed)
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert reconstruct("--save_tokens", "--batch_size", "2", "--out", str(whole)) == 0
    first, second = FlatModel(), FlatModel()
    with monkeypatch.context() as patch:
        if damage == "not joined":
            patch.setattr(reconstruction._Batches, "join", lambda *_: first.encode(()))
        first.fails_after = 8 if damage == "not joined" else 4
        assert reconstruct("--save_tokens", "--batch_size", "2", model=first) == 1
    (*_, leftover) = sorted((out / "unfinished").iterdir())
    if damage == "cut":
        leftover.write_bytes(leftover.read_bytes()[:-100])
    elif damage == "lost":
        (out / "000000_0.png").unlink()
    assert reconstruct("--save_tokens", "--batch_size", "2", model=second) == 0
    # the last batch is filled with its last image again
    assert second.num_encoded == {"": 4, "cut": 6, "lost": 6, "not joined": 0}[damage]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@pytest.mark.parametrize("what", ["images", "pixels", "weights"])
def test_results_of_other_images_or_weights_are_not_mixed(reconstruct, tmp_path, capsys, what):
    """A second run on more or fewer images would number them anew and leave some of the first run's files."""
    write_image(tmp_path / "in" / "b.png", 0)
    assert reconstruct() == 0 == reconstruct()
    if what != "weights":
        write_image(tmp_path / "in" / ("a.png" if what == "images" else "b.png"), 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert reconstruct(model=FlatModel(version=int(what == "weights"))) == 2
    words = "checkpoint='weights " if what == "weights" else f"images='{1 + (what == 'images')} images, names and "
    assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_image_damaged_while_the_command_runs_ends_it_and_leaves_no_array(tmp_path):
    """The images are read twice; a file that is bad the second time is named, and no npz is short by a row."""
    seen: list[str] = []

    def load(name: str) -> np.ndarray:
        seen.append(name)
        if seen.count(name) == 2 and name == "b":
            raise BadImage("cut short")
        return noise(SIDE, SIDE)

    images = Images.check(["a", "b", "c"], load)
    assert images.names == ["a", "b", "c"]
    with pytest.raises(RunError, match="^b could be read at the start and cannot any more: cut short"):
        write_reconstructions(FlatModel(), images, tmp_path, 1, saves_tokens=True)
    assert not list(tmp_path.glob("*.npz*"))


def test_an_image_without_error_is_left_out_of_the_mean_psnr(reconstruct, tmp_path, capsys):
    """A flat image is its own mean; the other one is not."""
    Image.fromarray(np.full((SIDE, SIDE, 3), 77, np.uint8)).save(tmp_path / "in" / "flat.png")
    pixels = write_image(tmp_path / "in" / "noise.png", 0)
    assert reconstruct() == 0
    flat, other, mean = (tmp_path / "out" / "psnr.md").read_text().splitlines()[2:5]
    assert flat.startswith("| flat.png | inf | 1.0000")
    level = np.full_like(pixels, np.rint(pixels.mean()))
    db = psnr(pixels[None], level[None], 255.0)[0]
    assert f"| {db:.2f} |" in other and f"| mean | {db:.2f} |" in mean
    note = "1 images have no error and are left out of PSNR, which is infinite for them"
    assert note in (tmp_path / "out" / "psnr.md").read_text() and note in capsys.readouterr().out


def test_images_that_are_too_small_for_ssim_are_reconstructed_without_it(reconstruct, tmp_path, capsys):
    class SmallModel(FlatModel):
        tokenizer = Tokenizer((1, 2), ch_mult=(1, 1, 1))

        def decode(self, ids_BL):
            return super().decode(ids_BL)[:, :8, :8]

    write_image(tmp_path / "in" / "noise.png", 0)
    assert reconstruct(model=SmallModel()) == 0
    lines = (tmp_path / "out" / "psnr.md").read_text().splitlines()[2:4]
    assert [line.rsplit(" | ")[-1] for line in lines] == ["- |"] * 2
    assert "no SSIM: its window of 11 x 11 pixels is larger than the images" in capsys.readouterr().out


def test_without_any_error_there_is_no_mean_psnr():
    table, notes = reconstruction.score_table(["a"], np.array([[np.inf, 1.0]]))
    assert table.splitlines()[-1] == "| mean | - | 1.0000 |" and len(notes) == 1
