"""`sweep`: a grid of sampling options, with a stand-in for the sampler whose images depend on the options."""

import csv
import json
import re
from pathlib import Path

import jax.numpy as jnp
import narrow_network
import numpy as np
import pytest
import small_case
from test_bad_input import refuse

from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.digits.scorer import DigitScorer
from mvar_jax.evaluation import frechet_distance, inception_score, scoring
from mvar_jax.evaluation.features import FeatureExtractor
from mvar_jax.evaluation.inception import Features
from mvar_jax.models.refiner import Refiner
from mvar_jax.sampling import bulk
from mvar_jax.sampling.sampler import sample

SIDES = (1, 4)  # 8 x 8 pixels, as the judge of digits needs
GRID = ["--cfg", "0", "2", "--temperature", "1", "1.2,1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model with a refiner, as a run on the digits would leave it."""
    return save_digits(tmp_path_factory.mktemp("digits"))


def save_digits(root: Path, num_classes: int = 3) -> Path:
    refiner = Refiner(SIDES, vocab_size=16, code_width=4, width=16, num_heads=2, depth=1)
    modules = {kind: module.clone(sides=SIDES) for kind, module in small_case.TINY_MODULES.items()}
    modules["transformer"] = modules["transformer"].clone(num_classes=num_classes)
    modules["refiner"] = refiner
    save_model(root, modules, {kind: small_case.seeded_params(module) for kind, module in modules.items()})
    (root / "config.json").write_text(json.dumps({"data": {"source": "digits", "image_size": 8}}))
    return root


@pytest.fixture
def drawn(monkeypatch):
    """The points that the sampler draws: (cfg, temperature, refined scales) of each batch."""
    found = []

    def draw(networks, labels_B, keys_B, options, outputs):
        assert outputs == ("pixels",)
        refined = networks.refiner.refined if networks.refiner else ()
        found.append((options.cfg, options.temperature, refined))
        seed = int(100 * options.cfg) + len(found[-1][2])
        side = networks.tokenizer.image_size
        noise = np.random.default_rng(seed).integers(0, 256, (1000, side, side, 3)).astype(np.uint8)
        return (jnp.asarray(noise[np.asarray(labels_B)]),)

    monkeypatch.setattr(bulk, "sample", draw)
    return found


def sweep(checkpoint, out, *more: str) -> list[dict[str, str]]:
    assert main(["sweep", "--checkpoint", str(checkpoint), "--out", str(out), "--num_samples", "20", *more]) == 0
    return list(csv.DictReader((Path(out) / "sweep.csv").open()))


def fake_scores(monkeypatch) -> None:
    """Let the digits' judge give the mean level and 1, without its classifiers."""
    score = lambda self, batches: dict(zip(self.names, (np.mean([p.mean() for p, _ in batches]), 1.0), strict=True))
    monkeypatch.setattr(DigitScorer, "score", score)


def test_every_combination_is_a_point_and_the_lowest_distance_is_chosen(digits, drawn, tmp_path):
    more = ["--refine_scales", "off", "all", "--batch_size", "8", "--least", "0"]
    rows = sweep(digits, tmp_path / "out", *GRID, *more)
    assert len(rows) == 8 and list(rows[0])[5:] == ["fd_20", "judge_accuracy", "seconds_a_sample", "chosen"]
    assert {(row["cfg"], row["temperature"], row["refine_scales"]) for row in rows} == {
        (cfg, t, scales) for cfg in ("0.0", "2.0") for t in ("1.0", "1.2,1.0") for scales in ("off", "all")
    }
    assert len(drawn) == 8 * 4 and len({*drawn}) == 8, "the first of three batches is drawn once more, to compile"
    best = min(rows, key=lambda row: (float(row["fd_20"]), float(row["seconds_a_sample"])))
    assert [row for row in rows if row["chosen"]] == [best] and float(best["fd_20"]) > 0
    assert all(0 < float(row["seconds_a_sample"]) < 60 for row in rows)
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_chosen_point_names_its_refined_scales_if_others_are_tried(digits, drawn, tmp_path, monkeypatch, capsys):
    fake_scores(monkeypatch)
    sweep(digits, tmp_path / "out", "--cfg", "1", "--refine_scales", "off", "0", "1")
    assert re.search(r"chosen: cfg 1.0, T 1.0, refined scales (off|0|1); fd_20", capsys.readouterr().out)
    sweep(digits, tmp_path / "alone", "--cfg", "1")
    assert "chosen: cfg 1.0, T 1.0; fd_20" in capsys.readouterr().out


def test_programs_of_earlier_points_are_given_up(digits, tmp_path, monkeypatch):
    """A process that kept them would reach its limit of memory maps after some 150 points."""
    fake_scores(monkeypatch)
    sample.clear_cache()
    sweep(digits, tmp_path / "out", "--cfg", "1", "2", "--refine_scales", "off")
    assert sample._cache_size() == 0


def test_points_that_stand_in_the_csv_are_not_drawn_again(digits, drawn, tmp_path, monkeypatch, capsys):
    fake_scores(monkeypatch)
    before = sweep(digits, tmp_path, "--cfg", "0", "2")
    drawn.clear()
    rows = sweep(digits, tmp_path, "--cfg", "2", "4", "0")
    assert {cfg for cfg, *_ in drawn} == {4.0} and len(rows) == 3
    scores = lambda rows: [row["fd_20"] for row in rows]
    assert scores(rows)[:2] == scores(before)
    drawn.clear()
    rows = sweep(digits, tmp_path, "--cfg", "0", "--least", "2")
    assert not drawn and len(rows) == 3 and not any(row["chosen"] for row in rows)
    assert "none with judge_accuracy of 2 or more" in capsys.readouterr().out


def test_a_sweep_that_was_killed_continues_with_the_next_point(digits, drawn, tmp_path, monkeypatch):
    fake_scores(monkeypatch)
    whole = sweep(digits, tmp_path / "whole", *GRID)
    draw = bulk.sample

    def die(networks, labels_B, keys_B, options, outputs):
        if options.cfg == 2:
            raise KeyboardInterrupt
        return draw(networks, labels_B, keys_B, options, outputs)

    line = ["sweep", "--checkpoint", str(digits), "--num_samples", "20", *GRID, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "sample", die)
        assert main(line) == 130
    drawn.clear()
    rows = sweep(digits, tmp_path / "out", *GRID)
    assert {cfg for cfg, *_ in drawn} == {2.0}
    assert [row["fd_20"] for row in rows] == [row["fd_20"] for row in whole]


def test_other_samples_and_a_damaged_csv_are_refused(digits, drawn, tmp_path, monkeypatch, capfd):
    fake_scores(monkeypatch)
    sweep(digits, tmp_path, "--num_samples", "21")
    line = ["sweep", "--checkpoint", str(digits), "--out", str(tmp_path), "--num_samples", "21"]
    refuse(capfd, [*line, "--seed", "1"], "seed=1 differs from 0", "choose another --out")
    refuse(capfd, [*line, "--num_samples", "20"], "num_samples=20 differs from 21")
    path = tmp_path / "sweep.csv"
    path.write_text(path.read_text().replace("fd_21", "fd"))
    damaged = path.read_text()
    refuse(capfd, line, "has a sweep.csv that cannot be continued")
    assert path.read_text() == damaged


def test_with_a_reference_the_scores_are_those_of_evaluate(tiny_model, drawn, tmp_path, monkeypatch):
    narrow_network.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    references = np.random.default_rng(1).integers(0, 256, (60, 6, 6, 3)).astype(np.uint8)
    np.savez("reference.npz", arr_0=references)
    inception = ["--reference", "reference.npz", "--inception", "x.npz"]
    rows = sweep(tiny_model, "out", *inception, "--cfg", "1", "3")
    assert [row["refine_scales"] for row in rows] == ["off", "off"]
    for row in rows:
        noise = np.random.default_rng(int(100 * float(row["cfg"]))).integers(0, 256, (1000, 6, 6, 3))
        ours = narrow_network.features_of(noise[np.arange(20) % 3].astype(np.uint8))
        theirs = narrow_network.features_of(references)
        assert float(row["fid"]) == pytest.approx(frechet_distance(ours.pool, theirs.pool), rel=1e-9)
        shuffled = ours.probabilities[np.random.default_rng(scoring.SHUFFLE_SEED).permutation(20)]
        assert float(row["inception_score"]) == pytest.approx(inception_score(shuffled), rel=1e-9)
    assert not Path("out/unfinished").exists()


def test_few_samples_are_spread_over_the_classes_with_a_warning(drawn, tmp_path, monkeypatch, capsys):
    save_digits(tmp_path / "ten", num_classes=10)
    labels = []

    def score(self, batches):
        labels.extend(np.concatenate([labels_B for _, labels_B in batches]).tolist())
        return dict.fromkeys(self.names, 1.0)

    monkeypatch.setattr(DigitScorer, "score", score)
    sweep(tmp_path / "ten", tmp_path / "out", "--num_samples", "5", "--refine_scales", "off")
    assert labels == [0, 2, 4, 6, 8]
    assert "warning: the labels are 5 of the model's 10 classes" in capsys.readouterr().err


def test_the_network_rests_while_samples_are_drawn_and_timed(tiny_model, drawn, tmp_path, monkeypatch):
    """Otherwise its seconds would count as those of the samples, since both share the devices."""
    running = []

    class Lazy:
        """Features that are computed until they are fetched."""

        def __init__(self, rows):
            self.rows = rows
            running.append(self)

        def __array__(self, dtype=None, copy=None):
            running.remove(self)
            return self.rows

    class Extractor(FeatureExtractor):
        def __init__(self, weights, batch_size=None, dtype="float32"):
            self.batch_size = 4

        def compute(self, pixels_BYX3):
            return Features(*map(Lazy, narrow_network.features_of(pixels_BYX3)))

    draw = bulk.sample
    narrow_network.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "FeatureExtractor", Extractor)
    busy = []
    monkeypatch.setattr(bulk, "sample", lambda *args: busy.append(len(running)) or draw(*args))
    np.savez("reference.npz", arr_0=np.random.default_rng(1).integers(0, 256, (60, 6, 6, 3)).astype(np.uint8))
    sweep(tiny_model, "out", "--reference", "reference.npz", "--inception", "x.npz", "--batch_size", "4")
    assert len(busy) == 6 and not any(busy) and not running


def test_the_warnings_of_evaluate_are_printed(tiny_model, drawn, tmp_path, monkeypatch, capsys):
    narrow_network.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", arr_0=np.zeros((60, 6, 6, 3), np.uint8))
    sweep(tiny_model, "out", "--reference", "reference.npz", "--inception", "x.npz", "--num_samples", "5")
    errors = capsys.readouterr().err
    assert "warning: 5 samples are fewer than the 7 that a covariance of 6 features needs" in errors
    assert "warning: the labels are unbalanced, 1 to 2 images of each of 3 classes" in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cfg", "1", "-1"], ["cfg must be", "got -1"]),
        (["--temperature", "1", "1,2,3"], ["temperature must be one number or 2", "got 3"]),
        (["--top_p", "2"], ["top_p must be"]),
        (["--refine_scales", "all", "5"], ["refine_scales must be numbers of 0, 1, rising, got (5,)"]),
        (["--refine_scales", "two"], ["refine_scales must be numbers or ranges", "'two'"]),
        (["--num_samples", "1"], ["--num_samples must be at least 2"]),
        (["--num_samples", "1" + 22 * "0"], ["num must be from 1 to"]),
        (["--least", "nan"], ["least must be a finite number, got nan"]),
        (["--labels", "3"], ["labels must be", "got 3"]),
        (["--inception", "x.npz"], ["--inception needs --reference"]),
        (["--reference", "none.npz"], ["give --inception: download"]),
        (["--switch", "1:/nowhere"], ["switch=/nowhere cannot be loaded"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("--") else "",
)
def test_bad_input_is_refused_before_the_first_sample(digits, drawn, tmp_path, capfd, flags, words):
    out = tmp_path / "out"
    refuse(capfd, ["sweep", "--checkpoint", str(digits), "--out", str(out), *flags], *words)
    assert not out.exists() and not drawn


def test_a_model_of_other_images_needs_a_reference(tiny_model, tmp_path, capfd):
    line = ["sweep", "--checkpoint", str(tiny_model), "--out", str(tmp_path / "out")]
    refuse(capfd, line, "give --reference and --inception", "is no run on the digits")
    assert not (tmp_path / "out").exists()
