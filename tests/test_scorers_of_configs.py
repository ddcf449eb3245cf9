"""The scorer that a config asks for, and what is refused."""

import jax
import numpy as np
import pytest

from mvar_jax.data.options import DataOptions
from mvar_jax.digits.scorer import DigitScorer
from mvar_jax.errors import InputError
from mvar_jax.scorers import make_scorer
from mvar_jax.sharding import make_mesh
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.task import RunOptions

DIGITS, OTHERS = DataOptions(source="digits", image_size=32), DataOptions(source="synthetic", image_size=32)
DOWNLOAD = r"pt_inception-2015-12-05-6726825d.pth \(SHA-256 6726825d...\) from https://.*, then run `mvar convert "
STATISTICS = {"mu": np.zeros(2048), "sigma": np.eye(2048)}


def scorer_of(kind="transformer", data=OTHERS, num_val=10, **changes):
    mesh = make_mesh(devices=jax.devices()[:1])
    run = RunOptions(0, 10, 2, OptimizerOptions(), mesh, **{"eval_samples": 4, **changes})
    return make_scorer(kind, run, data, 32, num_val)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "config.eval_reference must be the .npz of a reference"),
        ({"eval_reference": "good.npz"}, f"config.eval_inception='' is missing: download {DOWNLOAD}"),
        (
            {"eval_reference": "good.npz", "eval_inception": "x.npz"},
            f"config.eval_inception=x.npz is missing: download {DOWNLOAD}",
        ),
        ({"eval_reference": "none.npz"}, "config.eval_reference=none.npz is not a usable .npz file: No such file"),
        ({"eval_reference": "short.npz"}, r"config.eval_reference=.*mu must have shape \[2048\], got .*\[64\]"),
        ({"eval_reference": "small.npz"}, "config.eval_reference=.*images of 32 x 32, the model's, got 16 x 16"),
        ({"data": DIGITS, "eval_inception": "x.npz"}, "config.eval_reference must be the .npz of a reference"),
        ({"kind": "tokenizer"}, f"config.eval_inception='' is missing: download {DOWNLOAD}"),
        ({"kind": "tokenizer", "data": DIGITS, "num_val": 3}, "config.eval_samples must be at most 3, the number of"),
        ({"kind": "tokenizer", "eval_cfg": 2.0}, "config.eval_cfg means nothing for a tokenizer"),
        ({"kind": "tokenizer", "eval_reference": "good.npz"}, "config.eval_reference means nothing for a tokenizer"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused_in_one_sentence(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    files = {"short": {"mu": np.zeros(64), "sigma": np.eye(64)}, "small": {"arr_0": images}, "good": STATISTICS}
    for name in files:
        if f"{name}.npz" in changes.values():
            np.savez(f"{name}.npz", **files[name])
    with pytest.raises(InputError, match=words) as caught:
        scorer_of(**changes)
    assert caught.value.field.startswith("config.eval_") and "\n" not in str(caught.value)


def test_digits_are_judged_without_any_file_and_zero_samples_by_nobody():
    scorer = scorer_of(data=DIGITS)
    assert isinstance(scorer, DigitScorer) and scorer.names == ("fd_4", "judge_accuracy")
    assert scorer_of(eval_samples=0) is None and scorer_of("tokenizer", eval_samples=0) is None


def test_a_converted_file_gives_fid_and_inception_score(inception_stub, tmp_path):
    np.savez(tmp_path / "r.npz", **STATISTICS)
    scorer = scorer_of(eval_inception="x.npz", eval_reference=str(tmp_path / "r.npz"), eval_samples=2000)
    assert scorer.names == ("fid_2k", "inception_score_2k")
    assert scorer_of("tokenizer", eval_inception="x.npz", num_val=4).names == ("rfid_4",)


@pytest.fixture
def inception_stub(monkeypatch):
    """A network without weights, at the door where a file is read."""
    from mvar_jax.evaluation import inception_weights
    from mvar_jax.evaluation.network_files import NetworkWeights

    weights = NetworkWeights(inception_weights.NETWORK, {}, {}, None)
    monkeypatch.setattr(inception_weights, "load_inception", lambda path: weights)


@pytest.mark.parametrize("name", ["eval_inception", "eval_reference"])
def test_files_of_scores_without_samples_are_refused(name):
    with pytest.raises(InputError, match=f"config.{name} must be '' if config.eval_samples is 0") as caught:
        scorer_of(eval_samples=0, **{name: "x.npz"})
    assert caught.value.field == f"config.{name}"
