"""`evaluate --tokenizer` on a tokenizer of 12 x 12 pixels."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from golden_case import quick_jit
from image_files import noise
from PIL import Image
from small_case import TOKENIZER, seeded_params

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.cli.evaluate_tokenizer import evaluation_of
from mvar_jax.data.options import DataOptions
from mvar_jax.evaluation import tokenizer_scores
from mvar_jax.evaluation.inception import Features
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.evaluation.report import as_text
from mvar_jax.evaluation.tokenizer_report import FORMATS, VAR_TOKENIZER
from mvar_jax.evaluation.tokenizer_scores import TokenizerScorer
from mvar_jax.files.images import to_uint8
from mvar_jax.models.networks import Networks
from mvar_jax.ops.metrics import perplexity, psnr, ssim
from mvar_jax.ops.pixels import from_levels
from mvar_jax.scales import areas_of, offsets_of

SIDES = (1, 12)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tokenizer with random weights, and the config of a run on 24 digits beside it."""
    folder, tokenizer = tmp_path_factory.mktemp("tokenizer"), TOKENIZER.clone(sides=SIDES, ch_mult=(1,))
    save_model(folder, {"tokenizer": tokenizer}, {"tokenizer": seeded_params(tokenizer)})
    (folder / "config.json").write_text(json.dumps({"data": {"source": "digits", "image_size": 12, "size": 24}}))
    return str(folder)


@pytest.fixture
def evaluate(workdir, tmp_path):
    """(arguments) -> exit status of the command on the held-out images of the tokenizer's own config."""
    base = ["evaluate", "--tokenizer", workdir, "--images", "config:val", "--out", str(tmp_path / "out")]
    return lambda *arguments: main([*base, "--compilation_cache", "off", *arguments])


def reconstruct(networks, images):
    """Return the ids, and the images after each scale, in one program."""
    ids_BL = networks.apply_tokenizer(images, method="encode")
    f_hats = networks.apply_tokenizer(ids_BL, method="f_hats")
    return ids_BL, [networks.apply_tokenizer(f_hat, method="decode") for f_hat in f_hats]


def test_scores_by_scale_equal_those_of_the_images_that_are_decoded(workdir, evaluate, tmp_path, capsys):
    assert evaluate("--batch_size", "7") == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    data = DataOptions("digits", 12, size=24)
    source, transform = data.open("val"), data.transform()
    originals = np.stack([transform(source[number]["image"]) for number in range(len(source))])
    networks = mvar_jax.load(workdir).networks
    ids_BL, decoded = quick_jit(reconstruct)(networks, from_levels(originals))
    ids_BL = np.asarray(ids_BL)
    for scale, images in enumerate(decoded):
        entry, pixels = found["by_scale"][scale], to_uint8(images)
        assert entry["psnr"] == pytest.approx(psnr(originals, pixels, 255.0).mean(), rel=1e-4)
        assert entry["ssim"] == pytest.approx(ssim(originals, pixels, 255.0).mean(), abs=1e-4)
        begin = offsets_of(areas_of(SIDES))[scale]
        ids_N = ids_BL[:, begin : begin + SIDES[scale] ** 2].reshape(-1)
        hits_V = np.bincount(ids_N, minlength=TOKENIZER.vocab_size)
        assert entry["usage_percent"] == pytest.approx(100 * (hits_V > 0).mean())
        assert entry["perplexity"] == pytest.approx(perplexity(hits_V))
        assert (entry["scales"], entry["side"]) == (scale + 1, SIDES[scale])
    assert [found[name] for name in ("psnr", "ssim")] == [found["by_scale"][-1][name] for name in ("psnr", "ssim")]
    assert [found[name] for name in ("fid", "recall", "rfid", "lpips")] == [None] * 4
    assert (found["num_images"], found["skipped"]) == (24, [])
    settings = found["settings"]
    assert settings["tokenizer"]["sides"] == list(SIDES) and settings["tokenizer"]["dtype"] == "float32"
    assert settings["images"]["transform"] == "enlarged to 12 x 12 pixels by cubic splines"
    assert "cpu" in settings["device"] and settings["versions"]["jax"]
    with (out / "curves.csv").open() as file:
        assert [float(line["psnr"]) for line in csv.DictReader(file)] == [x["psnr"] for x in found["by_scale"]]
    assert Image.open(out / "curves.png").format == "PNG"
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        *("evaluation.json", "evaluation.txt", "evaluation_options.json", "curves.csv", "curves.png"),
    }
    assert re.search(rf"PSNR, dB +{found['psnr']:.3f}\n", printed)
    assert "note: no rFID: give --inception FILE\n" in printed

    before = (out / "evaluation.json").read_bytes()
    assert evaluate("--batch_size", "4") == 0
    assert capsys.readouterr().out.endswith("evaluation.json: already there\n")
    assert evaluate("--curves", "off") == 2
    assert "curves='off' differs from 'pixels', used for the evaluation in" in capsys.readouterr().err
    assert (out / "evaluation.json").read_bytes() == before


class Extractor:
    """A stand-in for the Inception network: the first feature is the mean, the others are 0."""

    def __init__(self, weights, batch_size):
        pass

    def compute(self, pixels):
        mean_B = np.asarray(pixels).mean((1, 2, 3), dtype=np.float32)
        return Features(np.pad(mean_B[:, None], [(0, 0), (0, 2047)]), mean_B[:, None], mean_B[:, None])


def score(monkeypatch, curves: str, num: int = 5) -> tuple[TokenizerScorer, list, dict]:
    """Score images with networks that compile nothing: an image of k scales is 10 k levels above its original."""
    tokenizer = TOKENIZER.clone(sides=SIDES)
    images = [noise(24, 24, number) // 2 for number in range(num)]

    def encode(networks, pixels):
        pixels = np.asarray(pixels)
        return np.full((len(pixels), sum(areas_of(SIDES))), pixels[:, :1, 0, 0]), [
            pixels + np.uint8(10 * k) for k in (1, 2)
        ]

    monkeypatch.setattr(tokenizer_scores, "encode_scales", encode)
    monkeypatch.setattr(tokenizer_scores, "decode_pixels", lambda networks, f_hat: f_hat)
    monkeypatch.setattr(tokenizer_scores, "FeatureExtractor", Extractor)
    difference = lambda params, a, b: (np.asarray(b, np.float32) - np.asarray(a)).mean((1, 2, 3))
    monkeypatch.setattr(tokenizer_scores, "compare_perceptually", difference)
    weights = NetworkWeights("stand-in", {}, {}, False)
    networks = Networks(tokenizer, {})
    scorer = TokenizerScorer(networks, weights, weights, 3, curves)
    return scorer, images, scorer.score(iter(images))


@pytest.mark.parametrize(
    ("curves", "scales", "featured"),
    [("off", (1,), (1,)), ("pixels", (0, 1), (1,)), ("all", (0, 1), (0, 1))],
)
def test_curves_decide_how_many_images_are_decoded_and_have_features(monkeypatch, curves, scales, featured):
    """Five images in batches of three: the rows that fill the second batch are not counted."""
    monkeypatch.setattr(
        tokenizer_scores, "count_hits", lambda ids, sides, vocab_size: np.full((2, vocab_size), len(ids))
    )
    scorer, images, found = score(monkeypatch, curves)
    assert (scorer.scales, scorer.featured) == (scales, featured)
    np.testing.assert_array_equal(found["mse"], [[(10 * (scale + 1)) ** 2] * 5 for scale in scales])
    np.testing.assert_array_equal(found["lpips"], [[10 * (scale + 1)] * 5 for scale in scales])
    assert (found["hits"] == 5).all()
    assert {name for name in found if name[:5] in ("scale", "origi")} == {*scorer.feature_names()}
    mean_N = np.mean(images, (1, 2, 3), dtype=np.float32)
    np.testing.assert_allclose(found["original"][:, 0], mean_N)
    for scale in featured:
        np.testing.assert_allclose(found[f"scale_{scale:02d}"][:, 0], mean_N + 10 * (scale + 1), rtol=1e-6)
    shapes = {name: [5 if n is None else n for n in shape] for name, shape in scorer.array_shapes().items()}
    assert {name: list(x.shape) for name, x in found.items()} == shapes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "nowhere"], "--images must be an image file or a folder of .jpg"),
        (["--images", "digits:test"], "--images must be digits:SPLIT with SPLIT train or val, got 'digits:test'"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--inception", "no.npz"], "inception=no.npz is missing: download pt_inception-2015-12-05-6726825d.pth ("),
        (["--lpips", "no.npz"], "lpips=no.npz is missing: download vgg16-397923af.pth (SHA-256 397923af...)"),
        (["--lpips", "LOADED"], "LPIPS needs a tokenizer of images of 16 x 16 pixels or more, got 12"),
        (["--tokenizer", "nowhere"], "checkpoint nowhere has no readable model.json"),
        (["--reference", "x.npz"], "--reference cannot be combined with --tokenizer"),
        (["--samples", "x.npz"], "--tokenizer cannot be combined with --samples"),
        (["--images", "digits:val", "--ignore_orientation"], "config.data.upright has no meaning for data.sou"),
        (["--inception", "LOADED", "--strict"], "--strict refuses scores that do not compare with others: 24"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(evaluate, tmp_path, monkeypatch, capfd, arguments, words):
    if "LOADED" in arguments:
        loaded = lambda path: NetworkWeights("stand-in", {}, {}, True)
        monkeypatch.setattr("mvar_jax.evaluation.lpips.load_lpips", loaded)
        monkeypatch.setattr("mvar_jax.evaluation.inception_weights.load_inception", loaded)
        monkeypatch.setattr(tokenizer_scores, "FeatureExtractor", Extractor)
    capfd.readouterr()
    assert evaluate(*arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")
    assert not (tmp_path / "out").exists()


def test_images_must_be_named(workdir, tmp_path, capfd):
    assert main(["evaluate", "--tokenizer", workdir, "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.startswith("error: --tokenizer needs --images: a folder of images or an image file")


def test_a_folder_without_a_usable_image_leaves_no_results(evaluate, tmp_path, capfd):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    assert evaluate("--images", str(tmp_path / "in")) == 2
    assert "--images must hold an image that can be used, got 1 bad ones; the last is b" in capfd.readouterr().err
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vocab_size", "num", "is_var", "has_note"),
    [(4096, 50_000, True, False), (4096, 100, True, True), (8192, 50_000, False, False)],
)
def test_the_published_rfid_stands_beside_that_of_a_tokenizer_of_vars_structure(vocab_size, num, is_var, has_note):
    entry = dict.fromkeys(FORMATS, 1) | {"rfid": 0.9}
    scores = dict.fromkeys(("rfid", "psnr", "ssim", "lpips"), 0.9)
    scores |= {"num_images": num, "exact_images": 2, "skipped": [], "by_scale": [entry]}
    structure = dict(VAR_TOKENIZER) | {"vocab_size": vocab_size}
    found = as_text(evaluation_of(scores, {"images": {"transform": "cut"}}, structure, ("take more",)))
    assert ("published (VAR)" in found) == is_var and bool(re.search(r"rFID +0.900 +0.92\n", found)) == is_var
    assert ("note: the published rFID is of 50000 validation images of ImageNet" in found) == has_note
    assert "note: 2 images have no error and are left out of PSNR, which is infinite for them\n" in found
    assert "warning: take more\n" in found
