"""Images that an evaluation draws for their scores."""

import types

import jax
import numpy as np
import pytest
import small_case

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.sources import SyntheticSource
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.metrics import psnr, ssim
from mvar_jax.ops.pixels import from_levels
from mvar_jax.processes import group
from mvar_jax.sharding import make_mesh
from mvar_jax.training import tokenizer_step
from mvar_jax.training.adversary import FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.scoring import Scorer, score_together
from mvar_jax.training.task import RunOptions, TaskData
from mvar_jax.training.tokenizer_step import evaluate_batch
from mvar_jax.training.tokenizer_task import TokenizerTask
from mvar_jax.training.transformer_step import PhaseOptions
from mvar_jax.training.transformer_task import TransformerTask

TOKENIZER = small_case.TINY_MODULES["tokenizer"].clone(ch_mult=(1,))
TRANSFORMER = small_case.TINY_MODULES["transformer"]
PARAMS = small_case.tiny_params() | {"tokenizer": small_case.seeded_params(TOKENIZER, std=0.5)}


class Listener(Scorer):
    """Keeps what it is given, as `drawn`."""

    names = ("mean_level",)

    def score(self, batches):
        self.drawn = [np.concatenate(x) for x in zip(*batches, strict=True)]
        return {"mean_level": float(self.drawn[0].mean())}


def options(num: int, **changes) -> RunOptions:
    mesh = make_mesh(devices=jax.devices()[:1])
    return RunOptions(0, 10, 2, OptimizerOptions(), mesh, eval_samples=num, **changes)


def task_data(num_val: int) -> TaskData:
    sizes = {"train": 4, "val": num_val} if num_val else {"train": 4}
    sources = {split: SyntheticSource(split, seed=0, size=size) for split, size in sizes.items()}
    return TaskData(sources, PhotoTransform(TOKENIZER.image_size, flip=False), LoadOptions())


def transformer_task(num: int, num_val: int = 0) -> TransformerTask:
    networks = Networks(TOKENIZER, PARAMS["tokenizer"])
    return TransformerTask(options(num), TRANSFORMER, PhaseOptions(), networks, task_data(num_val), scorer=Listener())


@pytest.fixture(scope="module")
def task():
    return transformer_task(35)


def state_of(params, ema=None):
    return types.SimpleNamespace(params=params, ema=ema)


def test_samples_are_balanced_equal_each_time_and_of_the_averaged_weights(task):
    """35 samples in two batches, without validation images."""
    assert task.has_evaluation and task.metrics == ("mean_level",)
    params = PARAMS["transformer"]
    first = task.evaluate(state_of(params))
    pixels, labels = task.scorer.drawn
    assert labels.tolist() == [i % 3 for i in range(35)] and pixels.shape == (35, 3, 3, 3)
    assert pixels.dtype == np.uint8 and len(np.unique(pixels.reshape(35, -1), axis=0)) > 20
    assert first == {"mean_level": pixels.mean()}
    other = jax.tree.map(np.zeros_like, params)
    assert task.evaluate(state_of(other, params)) == first != task.evaluate(state_of(other))


def test_few_samples_are_spread_over_the_classes(monkeypatch):
    task = transformer_task(2)
    monkeypatch.setattr(task, "draw_samples", lambda params, tokenizer, labels, index: np.zeros((2, 3, 3, 3)))
    ((_, labels),) = task._samples(state_of(None))
    assert labels.tolist() == [0, 1]
    monkeypatch.setattr(task, "transformer", TRANSFORMER.clone(num_classes=1000))
    ((_, labels),) = task._samples(state_of(None))
    assert labels.tolist() == [0, 500]


def test_reconstructions_come_with_their_originals():
    """The first 3 of 4 validation images, whose batch is filled up."""
    task = TokenizerTask(options(3), TOKENIZER, CodebookOptions(), task_data(4), Listener())
    sums = {"loss": 1.0, "psnr_db": 1.0}, np.ones((len(TOKENIZER.sides), TOKENIZER.vocab_size)), 1.0
    task.evaluate_batch = lambda params, batch, fixed: sums  # takes as long to compile as the reconstructions
    assert task.metrics[-1] == "mean_level" and "loss" in task.metrics
    metrics = task.evaluate(state_of(PARAMS["tokenizer"]))
    reconstructions, originals = task.scorer.drawn
    assert metrics["mean_level"] == reconstructions.mean() and metrics.keys() >= set(task.metrics)
    source, transform = task.data["val"], task.transform
    np.testing.assert_array_equal(originals, [transform(source[i]["image"], None) for i in range(3)])
    assert reconstructions.shape == originals.shape and (reconstructions != originals).any()


class MeanDifference:
    """Stands in for LPIPS, whose network takes seconds to compile."""

    def apply(self, variables, a_BYX3, b_BYX3):
        return abs(a_BYX3 - b_BYX3).mean((1, 2, 3))


@pytest.mark.parametrize("side", [16, 8])
def test_an_evaluation_sums_what_it_measures_over_real_images(monkeypatch, side):
    """Two real images and one that fills the batch. Below 11 pixels there is no SSIM, without weights no LPIPS."""
    monkeypatch.setattr(tokenizer_step, "Lpips", MeanDifference)
    pixels, others = np.random.default_rng(0).integers(0, 256, (2, 3, side, side, 3)).astype(np.uint8)
    ids_BL = np.zeros((3, sum(side**2 for side in TOKENIZER.sides)), np.int32)
    outputs = 1.5 * from_levels(others), 0.0, types.SimpleNamespace(ids_BL=ids_BL)  # clipped before it is measured
    fake = {"apply": lambda params, images: outputs, "sides": TOKENIZER.sides, "vocab_size": TOKENIZER.vocab_size}
    tokenizer = types.SimpleNamespace(**fake)
    batch = {"image": pixels, "mask": np.float32([1, 1, 0])}
    sums, hits_SV, rows = evaluate_batch(tokenizer, {}, batch, FixedWeights(perceptual={}))
    assert rows == 2 and hits_SV.sum() == 2 * ids_BL.shape[1]
    pair = np.clip(1.5 * from_levels(others), -1, 1)[:2], from_levels(pixels)[:2]
    expected = {"loss": np.square(pair[0] - pair[1]).mean((1, 2, 3)), "psnr_db": psnr(*pair, 2)}
    expected |= {"lpips": abs(pair[0] - pair[1]).mean((1, 2, 3))} | ({"ssim": ssim(*pair, 2)} if side == 16 else {})
    assert sums.keys() == expected.keys()
    for name, values_B in expected.items():
        assert float(sums[name]) == pytest.approx(values_B.sum(), rel=1e-4, abs=1e-5), name
    assert "lpips" not in evaluate_batch(tokenizer, {}, batch, FixedWeights())[0]


def test_more_reconstructions_than_good_images_are_refused():
    task = TokenizerTask(options(3), TOKENIZER, CodebookOptions(), task_data(2), Listener())
    task.reconstruct = lambda params, pixels: np.zeros_like(pixels)
    with pytest.raises(InputError, match="config.eval_samples must be at most 2, the number of good"):
        task.scores(task._reconstructions(state_of(None)))


@pytest.mark.parametrize("index", [0, 1])
def test_every_process_draws_and_the_first_scores_for_all(monkeypatch, index):
    class Pair(group.Group):
        def gather(self, name, value):
            return [value, None] if index == 0 else [{"mean_level": 7.0}, value]

    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(group, "current", lambda: Pair(index, 2))
    scorer, drawn = Listener(), []
    batches = ((np.full((2, 1, 1, 3), 7, np.uint8), np.arange(2)) for _ in range(3) if drawn.append(1) is None)
    assert score_together(scorer, batches) == {"mean_level": 7.0}
    assert len(drawn) == 3 and hasattr(scorer, "drawn") == (index == 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num": 1}, "config.eval_samples must be 0 .none. or at least 2, got 1"),
        ({"num": 4, "eval_cfg": -1.0}, "config.eval_cfg must be from 0 .no guidance. to 1e6"),
        ({"num": 4, "eval_top_p": 2.0}, "config.eval_top_p must be from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        options(**changes)
    assert caught.value.field == words.split()[0]
