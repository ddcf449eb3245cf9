"""A refiner on the tiny run of the digits: trained, resumed, loaded, sampled with and refused, by the commands."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.checkpoints.trees import load_tree, save_tree
from mvar_jax.digits import judge, measure_run
from mvar_jax.errors import InputError
from mvar_jax.files.npz import load_npz
from mvar_jax.files.paths import as_path

OTHERS = ("refine_step", "kernel_size", "depth")


@pytest.fixture(scope="module")
def train(run) -> list[str]:
    """The command that trains the refiner, but for its workdir."""
    others = tuple(f"--config.model.{name}" for name in OTHERS)
    flags = [flag for flag in run.transformer_flags if not flag.startswith(others)]
    own = [f"--config.data.cache={run.tokens}", f"--config.init_from={run.transformer}", "--config.model.depth=1"]
    return ["train", "--config", "configs/digits_refiner.py", *flags, "--config.keep_best=loss", *own]


@pytest.fixture(scope="module")
def refiner(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("refiner") / "workdir"
    assert main([*train, "--workdir", str(workdir)]) == 0
    return workdir


def test_the_workdir_is_a_model_with_its_base(run, refiner):
    """Likelihood and samples are of the trained refiner; switched off, they are those of the base."""
    base, whole, off = mvar_jax.load(run.transformer), mvar_jax.load(refiner), mvar_jax.load(refiner, refiner=False)
    jax.tree.map(np.testing.assert_array_equal, whole.params, base.params)
    assert json.loads((refiner / "model.json").read_text())["format"] == 2 and off.networks.refiner is None
    ids = np.random.default_rng(0).integers(0, 32, (2, whole.num_tokens))
    np.testing.assert_array_equal(off.score(ids, [0, 1]), base.score(ids, [0, 1]))
    assert np.abs(whole.score(ids, [0, 1]) - base.score(ids, [0, 1])).max() > 1e-4
    np.testing.assert_allclose(whole.classify(ids[:1], [0, 1]).sum(), 1, rtol=1e-5)
    assert mvar_jax.load(refiner, "best").networks.refiner.window == 3


def test_a_killed_run_resumes_bit_equal(train, refiner, tmp_path):
    shutil.copytree(refiner, tmp_path / "workdir")
    shutil.rmtree(tmp_path / "workdir" / "checkpoints" / "3")
    assert main([*train, "--workdir", str(tmp_path / "workdir")]) == 0
    trees = [restore_weights(workdir) for workdir in (refiner, tmp_path / "workdir")]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *trees))


@pytest.fixture(scope="module")
def samples(run, refiner, tmp_path_factory):
    """A folder of samples: "base", of the transformer; "on", of its refiner; "off", of the refiner switched off."""
    folder = tmp_path_factory.mktemp("samples")

    def sample(checkpoint, name, *more):
        out = ["--out", str(folder / name), "--save_tokens", "--labels=0-3", "--num=1", "--batch_size=4", *more]
        assert main(["sample", "--checkpoint", str(checkpoint), *out]) == 0

    sample(run.transformer, "base")
    sample(refiner, "off", "--refiner=off")
    sample(refiner, "on", "--refine_scales=1-3")
    return folder


def test_samples_are_drawn_by_the_refiner_unless_it_is_off(refiner, samples, capfd):
    base, off = (load_npz(samples / name / "tokens.npz")["ids"] for name in ("base", "off"))
    np.testing.assert_array_equal(off, base)
    # three tiny steps move no draw; the folder's identity shows that the refiner drew
    capfd.readouterr()
    same = ["sample", "--checkpoint", str(refiner), "--save_tokens", "--labels=0-3", "--num=1", "--batch_size=4"]
    assert main([*same, "--refiner=off", "--out", str(samples / "on")]) == 2
    words = "were drawn with a refiner, but you asked for none; choose another --out"
    assert capfd.readouterr().err == f"error: the samples in {samples / 'on'} {words}\n"
    assert main([*same, "--out", str(samples / "off")]) == 2
    assert "were drawn without a refiner, but you asked for one; choose" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:a Frechet distance of")  # there are too few images for one
def test_the_report_shows_the_refiner_beside_its_transformer(run, refiner, samples, tmp_path, monkeypatch, capfd):
    """The losses are those of the two runs. Fewer images, a judge of their size and no grid of samples: for speed."""
    read = measure_run.load_digits
    few = lambda *args: {split: (x[:60], labels[:60]) for split, (x, labels) in read(*args).items()}
    monkeypatch.setattr(measure_run, "load_digits", few)
    monkeypatch.setattr(measure_run, "sample_grid", lambda model, seed: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(judge, "GRID_SIDE", 6)
    stages, out = tmp_path / "stages.json", tmp_path / "report"
    stages.write_text(json.dumps({"samples": {"wall_s": 1.0, "cpu_s": 1.0, "peak_rss_mib": 1.0}}))
    report = ["report", "--tokenizer", run.tokenizer, "--transformer", run.transformer, f"--out={out}"]
    report += [f"--stages={stages}", f"--samples={samples / 'base'}", f"--refiner={refiner}"]
    assert main(report) == 2
    assert "--refiner and --refined_samples must be given together" in capfd.readouterr().err
    assert main([*report, f"--refined_samples={samples / 'on'}"]) == 0
    figures = json.loads((out / "report.json").read_text())["figures"]
    ends = [measure_run.read_metrics(Path(workdir), "eval")[-1]["loss"] for workdir in (run.transformer, refiner)]
    assert [figures["base"]["val_loss_end"], figures["val_loss_end"]] == ends and ends[0] != ends[1]
    assert "| figure | transformer alone | with the refiner |" in capfd.readouterr().out


@pytest.mark.parametrize("scales", ["0,9", "two", "3-1", "0-1-3", "0-99999999999"])
def test_scales_that_do_not_exist_are_refused(refiner, tmp_path, scales, capfd):
    arguments = ["sample", "--checkpoint", str(refiner), "--labels=0", "--out", str(tmp_path / "out")]
    assert main([*arguments, f"--refine_scales={scales}"]) == 2
    assert "refine_scales must be numbers" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_refiner_of_another_base_is_refused(refiner, tmp_path):
    shutil.copytree(refiner, tmp_path / "workdir")
    tree = load_tree(as_path(tmp_path / "workdir" / "transformer"))
    save_tree(as_path(tmp_path / "workdir" / "transformer"), jax.tree.map(lambda x: np.asarray(x) * 1.01, tree))
    with pytest.raises(InputError, match="holds a refiner of another transformer: its base has fingerprint"):
        mvar_jax.load(tmp_path / "workdir")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("init_from=", "config.init_from must name a model directory or workdir with a transformer"),
        ("model.width=48", "config.model.width must be 24 as in the transformer, got 48"),
        ("model.window=4", "config.model.window must be an odd window side"),
    ],
)
def test_a_base_or_window_that_does_not_fit_is_refused(train, tmp_path, change, words, capfd):
    assert main([*train, f"--config.{change}", "--workdir", str(tmp_path / "workdir")]) == 2
    assert words in capfd.readouterr().err and not (tmp_path / "workdir").exists()
