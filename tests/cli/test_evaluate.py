"""`evaluate` on stored samples and on those of a model, with a stand-in for the Inception network."""

import contextlib
import json
import shutil
from pathlib import Path

import narrow_network
import numpy as np
import pytest
from PIL import Image

from mvar_jax.__main__ import main
from mvar_jax.evaluation import frechet_distance, inception_score, precision_recall, scoring
from mvar_jax.evaluation.reference import read_reference
from mvar_jax.evaluation.report import SAMPLE_SCORES
from mvar_jax.evaluation.sample_sets import of_npz
from mvar_jax.files.locks import LOCK_FILE
from mvar_jax.processes import group

SAMPLES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3)).astype(np.uint8)
OPTIONS_AND_LOCK = {"evaluation_options.json", LOCK_FILE}
REFERENCES = np.random.default_rng(1).integers(0, 256, (60, 6, 6, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    narrow_network.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=SAMPLES, arr_1=np.arange(40) % 4)
    np.savez("reference.npz", arr_0=REFERENCES)


def evaluate(*args, out="out", status=0) -> dict | None:
    """Run the command, with samples.npz and reference.npz unless others are given; return evaluation.json."""
    args = [str(arg) for arg in args]
    if not {"--samples", "--checkpoint"} & {*args}:
        args += ["--samples", "samples.npz"]
    if "--reference" not in args:
        args += ["--reference", "reference.npz"]
    assert main(["evaluate", *args, "--inception", "x.npz", "--out", out]) == status
    path = Path(out) / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else None


def refusal_of(capsys, *args, **options) -> str:
    evaluate(*args, status=2, **options)
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and not Path("out").exists()
    return lines[-1]


def shuffled(p_NK):
    return p_NK[np.random.default_rng(scoring.SHUFFLE_SEED).permutation(len(p_NK))]


def test_the_scores_are_those_of_the_features_of_both_sets():
    found = evaluate()
    ours, theirs = narrow_network.features_of(SAMPLES), narrow_network.features_of(REFERENCES)
    assert found["fid"] == pytest.approx(frechet_distance(ours.pool, theirs.pool), rel=1e-9)
    assert found["sfid"] == pytest.approx(frechet_distance(ours.spatial, theirs.spatial), rel=1e-9)
    assert found["inception_score"] == pytest.approx(inception_score(shuffled(ours.probabilities)), rel=1e-9)
    assert (found["precision"], found["recall"]) == precision_recall(theirs.pool, ours.pool)
    settings = found["settings"]
    assert settings["samples"]["classes"] == {"num_classes": 4, "fewest": 10, "most": 10}
    assert settings["samples"]["num_samples"] == 40 and settings["networks"]["inception"]["files"]
    assert {path.name for path in Path("out").iterdir()} >= {"evaluation.json", "evaluation.txt"}
    assert not Path("out/unfinished").exists()


def test_an_evaluation_continues_with_the_parts_that_are_there(monkeypatch, capsys):
    """Killed after any part it computes only the missing ones, and the scores are the same."""
    whole, num_whole = evaluate(out="whole"), narrow_network.NarrowExtractor.num_seen
    save, saved = narrow_network.feature_folder.save_npz, []

    def die_at_the_fourth(path, **arrays):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, **arrays)

    monkeypatch.setattr(narrow_network.NarrowExtractor, "num_seen", 0)
    with monkeypatch.context() as patch:
        patch.setattr(narrow_network.feature_folder, "save_npz", die_at_the_fourth)
        assert evaluate(status=130) is None
    monkeypatch.setattr(narrow_network.NarrowExtractor, "num_seen", 0)
    assert evaluate() == whole
    assert narrow_network.NarrowExtractor.num_seen == num_whole - 40
    capsys.readouterr()
    assert evaluate() == whole
    assert "already there" in capsys.readouterr().out


def test_a_folder_of_another_evaluation_is_refused(capsys):
    evaluate()
    before = Path("out/evaluation.json").read_bytes()
    np.savez("samples.npz", arr_0=SAMPLES[::-1])
    evaluate(status=2)
    assert "differs from" in (error := capsys.readouterr().err) and "choose another --out" in error
    assert Path("out/evaluation.json").read_bytes() == before


def test_the_order_changes_no_score_and_what_file_order_would_give_is_said(monkeypatch, capsys):
    monkeypatch.setattr(scoring, "inception_score", lambda p_NK: inception_score(p_NK, 10))
    p = narrow_network.features_of(SAMPLES).probabilities
    np.savez("samples.npz", arr_0=SAMPLES[np.argsort(p.argmax(1))])
    found = evaluate()
    assert found["settings"]["inception_score_in_file_order"] < found["inception_score"]
    assert "in the order of the files the inception score would be" in capsys.readouterr().out


def test_a_computed_reference_is_stored_in_the_published_form_and_gives_the_same_scores(capsys):
    whole = evaluate("--save_reference", "stored.npz")
    stored = read_reference("stored.npz")
    assert stored.pool is not None and stored.spatial is not None and len(stored.images) == 60
    again = evaluate("--reference", "stored.npz", out="again")
    for name in SAMPLE_SCORES:
        assert again[name] == pytest.approx(whole[name], rel=1e-12)
    alone = ["evaluate", "--reference", "reference.npz", "--save_reference", "b.npz", "--inception", "x"]
    assert main([*alone, "--image_size", "6"]) == 2
    assert "--image_size cannot be combined with an .npz file" in capsys.readouterr().err
    assert main(alone) == 0
    np.testing.assert_array_equal(read_reference("b.npz").pool.mean_D, stored.pool.mean_D)
    assert json.loads(Path("evaluation/evaluation.json").read_text())["fid"] is None


def test_several_processes_share_the_features_and_the_first_one_scores(monkeypatch, tmp_path):
    with contextlib.ExitStack() as stack:
        samples, references = (of_npz("x", Path(f"{name}.npz"), stack) for name in ("samples", "reference"))
        reference = scoring.ReferenceSet("x", None, None, references, 60, {}, {})
        comparison = scoring.Comparison(samples, reference, None, SAMPLE_SCORES)
        whole, _ = comparison.run(tmp_path / "whole")
        monkeypatch.setattr(narrow_network.NarrowExtractor, "num_seen", 0)
        for index, num_seen in ((1, 16 + 28), (0, 40 + 60)):
            monkeypatch.setattr(group, "current", lambda index=index: group.Group(index, 2))
            found, _ = comparison.run(tmp_path / "shared")
            assert narrow_network.NarrowExtractor.num_seen == num_seen
        assert found == whole


def test_a_large_reference_gives_precision_and_recall_of_images_spread_over_it(monkeypatch):
    monkeypatch.setattr(scoring, "MANIFOLD_IMAGES", 24)
    save_pngs("references", REFERENCES)
    found = evaluate("--reference", "references", "--save_reference", "stored.npz")
    in_order = np.concatenate([REFERENCES[::2], REFERENCES[1::2]])
    spread = in_order[np.arange(24) * 60 // 24]
    with np.load("stored.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], spread)
    ours, theirs = (narrow_network.features_of(x).pool for x in (SAMPLES, spread))
    assert (found["precision"], found["recall"]) == precision_recall(theirs, ours)


def test_a_data_set_is_a_reference_that_is_cut_to_the_size_of_the_samples(capsys):
    found = evaluate("--reference", "digits:val", "--save_reference", "digits.npz")
    stored = read_reference("digits.npz")
    assert len(stored.images) == 360 and stored.images.shape[1:3] == (6, 6)
    assert found["fid"] == pytest.approx(evaluate("--reference", "digits.npz", out="again")["fid"], rel=1e-12)
    assert found["settings"]["reference"]["statistics"] == "of 360 images"


def test_samples_of_a_model_are_those_of_sample_and_no_image_is_written(tiny_model, capsys):
    """Of 12 samples in batches of 5 and features in batches of 4 the scores are those of the file of `sample`."""
    drawing = ["--cfg", "2", "--top_k", "4", "--batch_size", "5", "--truncate_uint8", "--checkpoint", str(tiny_model)]
    assert main(["sample", *drawing, "--labels", "0-2", "--num", "4", "--out", "drawn"]) == 0
    found = evaluate(*drawing, "--num_samples", "12", "--inception_batch", "4")
    stored = evaluate("--samples", "drawn", out="stored")
    assert {name: found[name] for name in SAMPLE_SCORES} == {name: stored[name] for name in SAMPLE_SCORES}
    assert found["settings"]["samples"]["rounding"] == "down" == stored["settings"]["samples"]["rounding"]
    assert {"cfg": 2.0, "top_k": 4, "seed": 0}.items() <= found["settings"]["sampling"].items()
    assert {path.name for path in Path("out").iterdir()} <= {"evaluation.json", "evaluation.txt", *OPTIONS_AND_LOCK}
    ten = evaluate(*drawing, "--num_samples", "10", out="ten")
    with np.load("drawn/samples.npz") as drawn:
        np.savez("first.npz", arr_0=drawn["arr_0"][:10], arr_1=drawn["arr_1"][:10])
    assert ten["fid"] == evaluate("--samples", "first.npz", out="first")["fid"]
    assert ten["settings"]["samples"]["classes"] == {"num_classes": 3, "fewest": 3, "most": 4}
    capsys.readouterr()
    evaluate(*drawing, "--num_samples", "12", "--seed", "1", status=2)
    assert "seed=1 differs from 0, used for the evaluation in out" in capsys.readouterr().err


def test_a_preset_sets_the_published_sampling_options_and_refuses_others(tiny_model, capsys):
    args = ["--checkpoint", tiny_model, "--preset", "mvar-d20-ft"]
    assert "--cfg must be 1.5, as --preset mvar-d20-ft, got 3.0" in refusal_of(capsys, *args, "--cfg", 3)
    error = refusal_of(capsys, *args, "--num_samples", 9, "--top_k", "900", "--strict", "--scores", "inception_score")
    assert "num_samples=9 in place of 50000, image_size=6 x 6 in place of 256 x 256, num_classes=3 in place" in error
    assert "depth=2 in place of 20" in error
    assert "cfg" not in error and "truncate" not in error


def test_only_what_is_asked_for_is_computed_and_the_rest_is_null():
    found = evaluate("--scores", "recall,fid")
    assert {name for name in SAMPLE_SCORES if found[name] is not None} == {"fid", "recall"}


def test_bfloat16_features_state_the_difference_that_they_make(capsys):
    exact, found = evaluate(out="exact"), evaluate("--inception_dtype", "bfloat16")
    first = [narrow_network.features_of(SAMPLES[:16], dtype).pool for dtype in ("bfloat16", "float32")]
    theirs = narrow_network.features_of(REFERENCES).pool
    change = frechet_distance(first[0], theirs) - frechet_distance(first[1], theirs)
    assert found["settings"]["fid_change_by_dtype"] == pytest.approx(change, rel=1e-6)
    assert found["fid"] != exact["fid"] and f"changes FID by {change:+.4f}" in capsys.readouterr().out


def save_pngs(folder: str, images, suffix=".png") -> None:
    for i, image in enumerate(images):
        path = Path(folder) / f"{'ab'[i % 2]}/{i:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def test_a_folder_of_pngs_is_scored_as_the_file_with_the_same_images():
    save_pngs("pngs", SAMPLES)
    found = evaluate("--samples", "pngs")
    in_order = np.concatenate([SAMPLES[::2], SAMPLES[1::2]])
    assert found["fid"] == pytest.approx(evaluate(out="file")["fid"], rel=1e-9)
    p = narrow_network.features_of(in_order).probabilities
    assert found["inception_score"] == pytest.approx(inception_score(shuffled(p)), rel=1e-9)
    assert found["settings"]["samples"]["classes"] == {"num_classes": 2, "fewest": 20, "most": 20}


def test_jpeg_unbalanced_and_few_samples_are_warned_of_and_refused_if_strict(capsys):
    save_pngs("jpegs", SAMPLES[:6], ".jpg")
    np.savez("samples.npz", arr_0=SAMPLES, arr_1=np.arange(40) % 3)
    np.savez("pool.npz", mu=np.zeros(6), sigma=np.eye(6))
    for args, words in (
        (("--samples", "jpegs"), "6 of 6 samples are JPEG files"),
        (("--samples", "samples.npz"), "the labels are unbalanced, 13 to 14 images of each of 3 classes"),
        (("--samples", "jpegs", "--scores", "fid"), "6 samples are fewer than the 7 that a covariance of 6 features"),
        (("--reference", "pool.npz", "--scores", "fid"), "pool.npz has no spatial statistics, as pytorch-fid writes"),
        (("--preset", "mvar-d16", "--samples", "samples.npz"), "num_samples=40 in place of 50000, image_size=6 x 6"),
    ):
        assert "--strict refuses" in refusal_of(capsys, *args, "--strict")
        found = evaluate(*args)
        assert any(words in warning for warning in found["warnings"])
        assert words in capsys.readouterr().err
        shutil.rmtree("out")


def test_published_scores_are_shown_beside_ours(capsys):
    found = evaluate("--preset", "mvar-d24-ft")
    assert found["published"]["fid"] == 2.15 and found["published"]["recall"] == 0.56
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ours", "published", "(mvar-d24-ft)"]
    assert lines[1].split() == ["FID", f"{found['fid']:.3f}", "2.15"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--samples", "none.npz"], "samples=none.npz is missing"),
        (
            ["--reference", "none.npz"],
            "reference=none.npz is missing; docs/reproducing.md says where",
        ),
        (["--samples", "cut.npz"], "samples=cut.npz is not a usable .npz file"),
        (
            ["--samples", "floats.npz"],
            "arr_0 must hold uint8 pixels from 0 to 255, got float32 [4, 6, 6, 3]; mvar_jax.files.images.to_uint8",
        ),
        (["--samples", "alpha.npz"], "arr_0 must be grey or RGB, got uint8 [9, 6, 6, 4]: Inception does not know"),
        (["--samples", "large.npz"], "samples must have the reference's 6 x 6 pixels, got 8 x 8 pixels"),
        (["--samples", "three.npz"], "samples must have at least 4 images, got 3"),
        (["--samples", "empty"], "samples=empty holds no image files"),
        (["--samples", "mixed"], "which has 8 x 8 pixels, unlike a/000.png with 6 x 6"),
        (["--samples", "broken"], "samples=broken holds a/000.png, which cannot be read as an image"),
        (["--samples", "clear"], "clear holds a/000.png, which has transparent pixels, and Inception does not know"),
        (["--samples", "begun"], "samples=begun holds samples that are not complete; run the same `mvar sample`"),
        (["--reference", "wide.npz"], "mu must have shape [6], got float64 [7]"),
        (["--reference", "nan.npz"], "mu or sigma is not finite"),
        (["--reference", "pool.npz"], "has no statistics of the spatial features (mu_s, sigma_s) for sfid"),
        (
            ["--reference", "pool.npz", "--scores", "precision"],
            "has no images (arr_0) for precision",
        ),
        (["--reference", "other.npz"], "reference=other.npz is of a network of SHA-256 ffff; --inception is 12ab"),
        (["--scores", "kid"], "--scores must be of fid, sfid, inception_score, precision, recall, got 'kid'"),
        (["--save_reference", "reference.npz", "--samples", "samples.npz"], "reference.npz, which exists"),
        (["--num_samples", "5"], "--num_samples cannot be combined with --samples"),
        (["--image_size", "5"], "--image_size cannot be combined with --samples"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(capsys, args, words):
    make_bad_files()
    assert words in refusal_of(capsys, *args)


def make_bad_files() -> None:
    Path("cut.npz").write_bytes(Path("samples.npz").read_bytes()[:-40])
    np.savez("floats.npz", arr_0=np.zeros((4, 6, 6, 3), np.float32))
    np.savez("alpha.npz", arr_0=np.zeros((9, 6, 6, 4), np.uint8))
    np.savez("large.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    np.savez("three.npz", arr_0=SAMPLES[:3])
    Path("empty").mkdir()
    save_pngs("mixed", SAMPLES[:4])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("mixed/a/002.png")
    save_pngs("broken", SAMPLES[:4])
    Path("broken/a/000.png").write_bytes(b"no image")
    save_pngs("clear", [np.dstack([x, np.full((6, 6), 254, np.uint8)]) for x in SAMPLES[:4]])
    save_pngs("begun", SAMPLES[:4])
    Path("begun/samples.json").write_text("{}")
    eye, network = np.eye(6), np.array([json.dumps({"f": "ffff"})])
    np.savez("wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez("nan.npz", mu=np.full(6, np.nan), sigma=eye)
    np.savez("pool.npz", mu=np.zeros(6), sigma=eye)
    np.savez("other.npz", mu=np.zeros(6), sigma=eye, mu_s=np.zeros(4), sigma_s=np.eye(4), network=network)


def test_a_missing_network_is_named_with_its_hash_and_the_command(capsys, monkeypatch):
    monkeypatch.undo()
    assert main(["evaluate", "--samples", "a", "--reference", "b", "--inception", "none.npz"]) == 2
    error = capsys.readouterr().err
    assert "pt_inception-2015-12-05-6726825d.pth (SHA-256 6726825d" in error and "mvar convert --inception" in error
