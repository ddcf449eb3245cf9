"""What may change between two starts of one training command."""

import json
import shutil
from pathlib import Path

import jax
import pytest

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.tokens.cache_reader import TokenCache


@pytest.fixture
def started(run, tmp_path) -> Path:
    """The transformer's run without its last checkpoint."""
    shutil.copytree(run.transformer, tmp_path / "workdir")
    shutil.rmtree(tmp_path / "workdir" / "checkpoints" / "3")
    return tmp_path / "workdir"


def arguments_with(run, cache: Path, *more: str) -> list[str]:
    own = [argument for argument in run.train_transformer if not argument.startswith("--config.data.cache=")]
    return [*own, f"--config.data.cache={cache}", *more]


def test_a_run_resumes_bit_equal_with_its_cache_elsewhere_and_another_way_of_computing(run, started, tmp_path):
    shutil.copytree(run.tokens, tmp_path / "moved")
    more = ["--config.data.num_threads=3", "--config.data.cache_memory_mib=0", "--config.keep_best=loss"]
    assert main([*arguments_with(run, tmp_path / "moved", *more), "--workdir", str(started)]) == 0
    trees = [restore_weights(workdir) for workdir in (run.transformer, started)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *trees))


def test_a_cache_of_other_images_is_refused(run, started, tmp_path, capfd):
    cache = [*run.cache, "--config.data.split_seed=1", "--out", str(tmp_path / "other")]
    assert main(cache) == 0
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in started.rglob("*")}
    assert main([*arguments_with(run, tmp_path / "other"), "--workdir", str(started)]) == 2
    words = "config.data must name the data of the run in"
    assert words in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in started.rglob("*")} == before


def test_without_a_checkpoint_another_model_takes_the_workdir(run, started):
    shutil.rmtree(started / "checkpoints")
    (started / "classes.json").write_text('["of", "other", "data"]')
    assert main([*run.train_transformer, "--config.model.depth=1", "--workdir", str(started)]) == 0
    model = mvar_jax.load(started)
    assert model.networks.transformer.depth == 1 and model.classes.find("9") == 9
    assert json.loads((started / "config.json").read_text())["model"]["depth"] == 1


def test_epochs_become_steps_of_the_data_which_are_said_kept_and_compared(run, tmp_path, capfd):
    num_images = len(TokenCache(run.tokens, "train"))
    steps = -(-num_images // 8)
    by_epochs = [argument for argument in run.train_transformer if "steps" not in argument]
    by_epochs += ["--config.eval_every_steps=0", "--config.save_every_steps=0", "--config.picture_every_steps=-1"]
    epochs = ["--config.num_steps=0", "--config.epochs=2.0", "--config.optimizer.warmup_steps=0"]
    epochs += ["--config.optimizer.warmup_epochs=0.5"]
    workdir = ["--workdir", str(tmp_path / "run")]
    assert main([*by_epochs, *epochs, *workdir]) == 0
    warmup = round(steps / 2)
    words = f"2 epochs with 0.5 epochs of warm-up: {num_images} images in batches of 8 make {2 * steps} steps, "
    assert words + f"the first {warmup} of them warm-up" in capfd.readouterr().out
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["num_steps"], kept["epochs"], kept["optimizer"]["warmup_steps"]) == (2 * steps, 2.0, warmup)
    same = [f"--config.num_steps={2 * steps}", f"--config.optimizer.warmup_steps={warmup}"]
    assert main([*by_epochs, *same, *workdir]) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert main([*by_epochs, *epochs, "--config.epochs=3.0", *workdir]) == 2
    assert f"config.num_steps is {3 * steps}, but the run in" in capfd.readouterr().err
