"""Sums over images and codes, and parts of them in a folder; the programs are compared in tests/cli."""

import csv
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mvar_jax.errors import RunError
from mvar_jax.evaluation import frechet_distance, tokenizer_parts
from mvar_jax.evaluation.image_sets import ImageSet
from mvar_jax.evaluation.tokenizer_parts import PartFolder
from mvar_jax.evaluation.tokenizer_report import FORMATS, table_of, write_curves
from mvar_jax.evaluation.tokenizer_scores import Totals, count_hits, frechet_to_originals
from mvar_jax.ops.metrics import psnr_of_error

SIDES, NUM_CODES, NUM_IMAGES, WIDTH = (1, 2), 8, 23, 6
rng = np.random.default_rng(0)
MSE_KN = rng.uniform(1, 99, (2, NUM_IMAGES))
FEATURES_ND = rng.normal(size=(NUM_IMAGES, WIDTH)).astype(np.float32)


class Scorer:
    """A stand-in for `TokenizerScorer`: the scores of an image are looked up by its first pixel."""

    scales, featured = (0, 1), (1,)
    tokenizer = SimpleNamespace(sides=SIDES, vocab_size=NUM_CODES)

    def feature_names(self):
        return ["original", "scale_01"]

    def scale_names(self):
        return ["scale_00", "scale_01"]

    def array_shapes(self):
        per_image = dict.fromkeys(("mse", "ssim", "lpips"), (2, None))
        return per_image | {"hits": (2, NUM_CODES)} | dict.fromkeys(self.feature_names(), (None, WIDTH))

    def score(self, images):
        numbers = np.array([pixels[0, 0, 0] for pixels in images], int)
        ids_BL = np.stack([numbers % NUM_CODES] * 5, axis=1)
        found = {"hits": count_hits(ids_BL, SIDES, NUM_CODES), "mse": MSE_KN[:, numbers]}
        found |= {"ssim": np.full((2, len(numbers)), 0.5, np.float32), "lpips": np.full((2, len(numbers)), np.nan)}
        return found | {"original": FEATURES_ND[numbers], "scale_01": FEATURES_ND[numbers] + np.float32(0.5)}


class Images(ImageSet):
    """Images whose pixels are their number; the numbers in `bad` cannot be used."""

    about: dict = {}

    def __init__(self, num=NUM_IMAGES, bad=()):
        self.num, self.bad, self.seen, self.alive, self.most = num, bad, [], 0, 0

    def __len__(self):
        return self.num

    def name_of(self, number):
        return f"{number}.png"

    def stream(self, numbers):
        for number in numbers:
            self.seen.append(number)
            if number in self.bad:
                yield "cut short"
                continue
            pixels = np.full((2, 2, 3), number % NUM_IMAGES, np.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(pixels, self._free)
            yield pixels

    def _free(self):
        self.alive -= 1


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    """images -> their folder of parts of 8 images, in tmp_path."""
    monkeypatch.setattr(tokenizer_parts, "PART_IMAGES", 8)
    return lambda images: PartFolder(tmp_path, images, Scorer())


def fill(folder, parts=None) -> list[int]:
    """Return the numbers of the images that were read."""
    folder.images.seen.clear()
    folder.fill(folder.find_missing(range(folder.num_parts) if parts is None else parts), lambda: None)
    return list(folder.images.seen)


def test_scores_are_means_over_images_and_the_distance_of_all_features(folder_of):
    folder = folder_of(Images())
    assert fill(folder) == list(range(NUM_IMAGES))
    scores = folder.scores()
    psnr_K = psnr_of_error(MSE_KN, 255.0).mean(1)
    assert [entry["psnr"] for entry in scores["by_scale"]] == pytest.approx(psnr_K)
    assert (scores["psnr"], scores["ssim"], scores["lpips"]) == (pytest.approx(psnr_K[1]), 0.5, None)
    assert (scores["num_images"], scores["exact_images"], scores["skipped"]) == (NUM_IMAGES, 0, [])
    expected = frechet_distance(FEATURES_ND, FEATURES_ND + np.float32(0.5))
    assert scores["rfid"] == scores["by_scale"][1]["rfid"] == pytest.approx(expected, rel=1e-6)
    assert scores["by_scale"][0]["rfid"] is None


def test_processes_share_the_parts_and_give_the_same_scores(folder_of, tmp_path):
    folder = folder_of(Images())
    fill(folder)
    whole = folder.scores()
    for file in tmp_path.glob("*.npz"):
        file.unlink()
    assert [fill(folder, range(i, 3, 2)) for i in (1, 0)] == [[*range(8, 16)], [*range(8), *range(16, 23)]]
    assert folder.scores() == whole


def test_a_stopped_run_continues_with_the_part_that_it_had_begun(folder_of, tmp_path):
    folder, counter = folder_of(Images()), itertools.count()

    def stop() -> None:
        if next(counter) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.fill(folder.find_missing(range(3)), stop)
    assert fill(folder) == [*range(8, 23)]
    part = tmp_path / "000001.npz"
    part.write_bytes(part.read_bytes()[:1000])
    assert fill(folder) == [*range(8, 16)]
    assert fill(folder) == []


def test_a_part_with_a_damaged_byte_is_computed_again(folder_of, tmp_path, monkeypatch):
    """The features are so wide that their headers are read without them."""
    monkeypatch.setitem(globals(), "WIDTH", 2000)
    monkeypatch.setitem(globals(), "FEATURES_ND", rng.normal(size=(NUM_IMAGES, 2000)).astype(np.float32))
    folder, part = folder_of(Images()), tmp_path / "000001.npz"
    fill(folder)
    data = bytearray(part.read_bytes())
    data[data.index(FEATURES_ND[12].tobytes())] ^= 255
    part.write_bytes(bytes(data))
    assert fill(folder) == [*range(8, 16)]
    assert np.array_equal(np.load(part)["original"], FEATURES_ND[8:16])


def test_bad_images_are_left_out_and_named(folder_of):
    folder = folder_of(Images(bad={3, 22}))
    fill(folder)
    scores = folder.scores()
    assert scores["num_images"] == 21
    assert scores["skipped"] == [{"number": n, "name": f"{n}.png", "reason": "cut short"} for n in (3, 22)]
    good = [n for n in range(NUM_IMAGES) if n not in (3, 22)]
    assert scores["psnr"] == pytest.approx(psnr_of_error(MSE_KN[1, good], 255.0).mean())


def test_images_that_all_went_bad_meanwhile_end_the_run(folder_of):
    folder = folder_of(Images(bad=range(NUM_IMAGES)))
    fill(folder)
    with pytest.raises(RunError, match="no image can be used any more; the last is 22.png: cut short"):
        folder.scores()


def test_no_more_images_are_in_memory_if_there_are_more_of_them(folder_of):
    """A scorer that keeps a batch of images sees those alone; of ten times as many images no more are alive."""
    most = []
    for num in (24, 240):
        images = Images(num)
        fill(folder_of(images))
        most.append(images.most)
    assert most[0] == most[1] <= 3


def totals_of(*mse_of_parts, hits=(1, 0, 0, 0)):
    totals = Totals((1,), (1, 2))
    for mse in mse_of_parts:
        mse_1N = np.array([mse], float)
        part = {"mse": mse_1N, "ssim": np.full_like(mse_1N, np.nan), "lpips": mse_1N / 10}
        totals.add(part | {"hits": np.array([hits, hits])})
    return totals.scores()


def test_parts_of_any_sizes_give_the_same_totals():
    whole, parts = totals_of([1, 2, 3]), totals_of([1], [], [2, 3])
    for name in ("psnr", "lpips", "num_images"):
        assert whole[name] == pytest.approx(parts[name], rel=1e-14)


@pytest.mark.parametrize(
    ("mse", "psnr", "exact"),
    [((1, 100), (psnr_of_error(np.float64(1), 255.0) + psnr_of_error(np.float64(100), 255.0)) / 2, 0)]
    + [((1, 0), psnr_of_error(np.float64(1), 255.0), 1), ((0, 0), None, 2)],
)
def test_images_without_error_are_counted_and_left_out_of_psnr(mse, psnr, exact):
    scores = totals_of(mse)
    assert scores["psnr"] == (psnr and pytest.approx(psnr)) and scores["exact_images"] == exact
    assert scores["ssim"] is None and scores["lpips"] == pytest.approx(np.mean(mse) / 10)
    assert scores["by_scale"][0]["psnr"] is None


@pytest.mark.parametrize(
    ("hits", "used", "possible", "margin", "perplexity"),
    [
        ((5, 5, 5, 5), 100, 100, 100, 4),
        ((100, 0, 0, 1), 50, 100, 25, np.exp(-(100 * np.log(100 / 101) + np.log(1 / 101)) / 101)),
        ((2, 0, 0, 0), 25, 50, 25, 1),
    ],
)
def test_usage_counts_codes_beside_the_most_that_a_scale_can_reach(hits, used, possible, margin, perplexity):
    """The margin is 0.08 times the mean hits of a code: 2.02 of 101 hits on 4 codes, which one hit does not reach."""
    found = totals_of([1], hits=hits)["by_scale"][0]
    assert [found[f"{name}_percent"] for name in ("usage", "possible", "margin")] == [used, possible, margin]
    assert found["perplexity"] == pytest.approx(perplexity)


def test_hits_are_counted_by_scale():
    ids_BL = np.array([[0, 1, 1, 1, 2], [3, 0, 0, 0, 0]])
    assert count_hits(ids_BL, (1, 2), 4).tolist() == [[1, 0, 0, 1], [4, 3, 1, 0]]


def test_every_set_of_features_is_compared_with_the_first():
    sets = {name: rng.normal(size=(90, 5)) + i for i, name in enumerate(("original", "a", "b"))}
    found = frechet_to_originals([*sets], lambda name: [sets[name][:0], sets[name][:31], sets[name][31:]])
    assert found == {name: pytest.approx(frechet_distance(sets["original"], sets[name])) for name in ("a", "b")}


def test_table_and_curves_hold_each_scale_and_leave_out_what_is_not_computed(tmp_path):
    by_scale = [entry | {"rfid": None} for entry in totals_of([4])["by_scale"]]
    header, *rows = (line.split() for line in table_of(by_scale).splitlines()[:3])
    assert header == [name for name in FORMATS if name not in ("ssim", "rfid")]
    assert rows[0][-2:] == ["-", "-"] and rows[1][header.index("psnr")] == "42.110"
    write_curves(tmp_path, by_scale)
    with (tmp_path / "curves.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["scales"] for line in lines] == ["1", "2"]
    assert lines[0]["psnr"] == "" and float(lines[1]["psnr"]) == by_scale[1]["psnr"]
    assert Image.open(tmp_path / "curves.png").width > 900
