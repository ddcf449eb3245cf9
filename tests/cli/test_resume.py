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
from mvar_jax.training.optimizer import OptimizerOptions


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


def test_a_run_resumes_although_the_weights_that_it_began_with_are_gone(run, started, capfd):
    gone = [*run.train_transformer, "--config.init_from=models/gone", "--workdir", str(started)]
    assert main(gone) == 0
    assert "resuming from step 2 of 3" in capfd.readouterr().out


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
    assert main([*by_epochs, *epochs, "--config.epochs=1.0", *workdir]) == 2
    assert f"config.num_steps is {steps}, but the run in" in capfd.readouterr().err


def lines_of(workdir: Path, kind: str) -> dict[int, dict]:
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def test_a_finished_run_goes_on_to_a_larger_number_of_steps_with_another_learning_rate(run, tmp_path, capfd):
    workdir = tmp_path / "workdir"
    shutil.copytree(run.transformer, workdir)
    before = lines_of(workdir, "eval")
    longer = [*run.train_transformer, "--config.num_steps=5", "--workdir", str(workdir)]
    slower = [*longer, "--config.optimizer.base_learning_rate=0.001"]
    assert main(slower) == 2
    assert "pass --allow_change=optimizer.base_learning_rate to go on with it" in capfd.readouterr().err
    assert main([*slower, "--allow_change=config.optimizer.base_learning_rate,num_steps,"]) == 0
    assert "from step 3 on, config.num_steps is 5 instead of 3; learning rate and" in capfd.readouterr().out
    after, trained = lines_of(workdir, "eval"), lines_of(workdir, "train")
    assert {step: line["loss"] for step, line in after.items()} == {
        **{step: line["loss"] for step, line in before.items()},
        5: after[5]["loss"],
    }, "the evaluation at the old end is there as it was"
    rates = OptimizerOptions(base_learning_rate=0.001, schedule="cos", warmup_steps=1, final_factor=0.01)
    for step in (3, 4):
        assert trained[step]["learning_rate"] == pytest.approx(rates.at(step, 5, 8)[0])
    assert main(slower) == 0 and "nothing to do" in capfd.readouterr().out
    history = json.loads((workdir / "config.json").read_text())["history"]
    assert [(one["step"], one["key"], one["to"]) for one in history] == [
        (3, "num_steps", 5),
        (3, "optimizer.base_learning_rate", 0.001),
    ]


def test_change_of_a_finished_run_that_trains_no_step_is_not_kept(run, tmp_path, capfd):
    workdir = tmp_path / "workdir"
    shutil.copytree(run.transformer, workdir)
    before = (workdir / "config.json").read_bytes()
    same = [*run.train_transformer, "--workdir", str(workdir)]
    key = "optimizer.base_learning_rate"
    assert main([*same, f"--config.{key}=0.001", f"--allow_change={key}"]) == 0
    said = capfd.readouterr().out
    assert f"nothing to do, so config.{key} stays 0." in said and "a larger config.num_steps continues" in said
    assert (workdir / "config.json").read_bytes() == before
    assert main(same) == 0
