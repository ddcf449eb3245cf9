import json
import os

import pytest
from toy_run import NoWriter, ToyTask, make_settings

from mvar_jax.checkpoints.best import Metric, best_step
from mvar_jax.errors import InputError, RunError
from mvar_jax.training import logging
from mvar_jax.training.loop import run

CONFIG = {"lr": 0.01}
# by step; evaluated every 5 steps, saved every 4
LOSSES = {0: 9.0, 5: 3.0, 10: 1.0, 15: 2.0, 20: 4.0, 23: 5.0}


class Scripted(ToyTask):
    def evaluate(self, state):
        step = int(state.step)
        return super().evaluate(state) | {"loss": LOSSES[step], "psnr_db": LOSSES[step]}


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logging, "_open_summary_writer", lambda folder: NoWriter())


def checkpoints_of(workdir):
    return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())


@pytest.mark.parametrize(
    "keep_best, expected, best",
    # 23 turns out to be the most only after its checkpoint is there, so 20 is there too
    [("", [23], None), ("loss", [10, 23], 10), ("psnr_db:max", [20, 23], 23)],
)
def test_best_checkpoint_is_kept_beside_the_newest(tmp_path, keep_best, expected, best):
    run(Scripted(), tmp_path, make_settings(23, keep_best=keep_best, keep_checkpoints=1), CONFIG)
    assert checkpoints_of(tmp_path) == expected
    assert best_step(tmp_path) == best


def test_run_killed_after_its_best_step_goes_on_keeping_it(tmp_path):
    def fail(step):
        if step == 14:
            raise ValueError("killed")

    settings = make_settings(23, keep_best="loss", keep_checkpoints=1)
    with pytest.raises(ValueError, match="killed"):
        run(Scripted(on_step=fail), tmp_path, settings, CONFIG)
    assert best_step(tmp_path) == 10
    run(Scripted(), tmp_path, settings, CONFIG)
    assert checkpoints_of(tmp_path) == [10, 23]


class Blind(ToyTask):
    has_evaluation = False

    def evaluate(self, state):
        super().evaluate(state)
        return {}


def test_run_without_evaluation_is_complete_but_has_no_best_checkpoint(tmp_path, capsys):
    task = Blind()
    assert run(task, tmp_path, make_settings(10), CONFIG).step == 10 and task.evaluated_steps == [10]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "eval"] == [{"step": 10, "kind": "eval"}]
    run(Blind(), tmp_path, make_settings(10), CONFIG)
    assert "already holds step 10 of 10" in capsys.readouterr().out
    words = "config.keep_best=loss needs an evaluation, but the data have no validation split: set it to '', or hold"
    with pytest.raises(InputError, match=words) as error:
        run(Blind(), tmp_path / "other", make_settings(10, keep_best="loss"), CONFIG)
    assert error.value.field == "keep_best" and not (tmp_path / "other").exists()


def test_score_without_its_checkpoint_does_not_count(tmp_path):
    run(Scripted(), tmp_path, make_settings(23, keep_best="loss", keep_checkpoints=1), CONFIG)
    path = tmp_path / "checkpoints/scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"21": 0.0}))
    assert best_step(tmp_path) == 10


def damage(folder):
    path = folder / "params/kernel_DD/c/0/0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


def read_scores(workdir):
    return json.loads((workdir / "checkpoints/scores.json").read_text())["scores"]


def test_score_of_a_checkpoint_that_was_set_aside_does_not_come_back_with_its_step(tmp_path, monkeypatch):
    """The run passes step 10 again, with another score, which is worse than that of the damaged checkpoint."""
    settings = {"save_every_steps": 5, "keep_best": "loss"}
    run(Scripted(), tmp_path, make_settings(10, **settings), CONFIG)
    assert best_step(tmp_path) == 10
    damage(tmp_path / "checkpoints/10")
    monkeypatch.setitem(LOSSES, 10, 2.5)
    run(Scripted(), tmp_path, make_settings(15, **settings), CONFIG)
    assert best_step(tmp_path) == 15 and read_scores(tmp_path) == {"10": -2.5, "15": -2.0}


def test_stale_scores_are_gone_before_the_first_step(tmp_path):
    def fail(step):
        raise ValueError("killed")

    settings = {"save_every_steps": 5, "keep_best": "loss"}
    run(Scripted(), tmp_path, make_settings(10, **settings), CONFIG)
    damage(tmp_path / "checkpoints/10")
    with pytest.raises(ValueError, match="killed"):
        run(Scripted(on_step=fail), tmp_path, make_settings(15, **settings), CONFIG)
    assert read_scores(tmp_path) == {"5": -3.0}


def test_score_of_a_dropped_checkpoint_is_forgotten(tmp_path):
    """Step 10 is saved and scored, and then turns out to be poisoned: the first of three bad steps is step 10."""
    settings = make_settings(23, save_every_steps=5, keep_best="loss")
    with pytest.raises(RunError, match="for 3 steps in a row, up to step 12.*checkpoint of step 5"):
        run(Scripted(bad_steps=range(10, 23)), tmp_path, settings, CONFIG)
    assert checkpoints_of(tmp_path) == [5] and read_scores(tmp_path) == {"5": -3.0}


def test_metric_that_no_evaluation_has_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(InputError, match="config.keep_best must be .*one of loss, psnr_db, got 'los'"):
        run(Scripted(), tmp_path, make_settings(23, keep_best="los"), CONFIG)
    with pytest.raises(InputError, match="config.keep_best must be the name of a metric .*got 'loss:down'"):
        Metric.parse("loss:down")


def test_metric_that_a_task_does_not_have_is_refused_before_anything_is_written(tmp_path):
    task = Scripted()
    task.metrics = ("loss", "psnr_db")
    with pytest.raises(InputError, match="one of loss, psnr_db, got 'pnsr_db'") as caught:
        run(task, tmp_path / "run", make_settings(23, keep_best="pnsr_db"), CONFIG)
    assert caught.value.field == "config.keep_best" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "is_more_better"),
    [
        ("inception_score_1k", True),
        ("fid_1k", False),
        ("judge_accuracy", True),
        ("loss", False),
        ("fid", False),
        ("psnr_db", True),
        ("ssim", True),
        ("accuracy", True),
        ("codebook_used_percent", True),
        ("psnr_db:min", False),
        ("my_score:max", True),
    ],
)
def test_the_name_of_a_metric_decides_what_is_better_unless_a_direction_is_given(text, is_more_better):
    assert Metric.parse(text) == Metric(text.partition(":")[0], is_more_better)
