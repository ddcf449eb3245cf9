"""The steps of a run: given, or as epochs of its data."""

import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError

IN_EPOCHS = ["num_steps=0", "optimizer.warmup_steps=0", "codebook.warmup_steps=0", "codebook.revive_every_steps=0"]


def build_debug(*overrides: str):
    """Return (config, task) of the debug tokenizer."""
    config = read_config("debug", [f"--config.{override}" for override in overrides])
    return config, build.build_task(config)[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ""),
        ([*IN_EPOCHS, "epochs=2.0"], "2 epochs: {n} images in batches of 8 make {two} steps, the first 0 of"),
        (["optimizer.warmup_steps=0", "optimizer.warmup_epochs=1.0"], "1 epochs of warm-up: {n} images in batches"),
    ],
)
def test_epochs_are_described_with_or_without_those_of_the_warm_up(overrides, words):
    config, task = build_debug(*overrides)
    num = len(task.data["train"])
    assert build.describe_epochs(config, task).startswith(words.format(n=num, two=-(-num // 8) * 2))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_steps=4"], "config.codebook.warmup_steps must be below config.num_steps=4, got 4: the codebook would"),
        (
            ["optimizer.warmup_steps=0", "optimizer.warmup_epochs=2.4"],
            "config.optimizer.warmup_epochs must be below 2.4, the epochs of 12 steps of 8 images, got 2.4",
        ),
    ],
)
def test_a_warm_up_that_does_not_end_is_refused_by_the_key_that_was_given(overrides, words):
    with pytest.raises(InputError, match=words) as caught:
        build_debug(*overrides)
    assert caught.value.field == words.split()[0]


def test_a_codebook_may_be_drawn_before_the_last_step():
    assert build_debug("num_steps=5")[1].options.warmup_steps == 4


@pytest.mark.parametrize(("size", "expected"), [(4, False), (12, True)])
def test_a_tokenizer_names_ssim_for_keep_best_if_images_are_large_enough(size, expected):
    _, task = build_debug(f"data.image_size={size}", f"model.sides=(1,2,{size})")
    evaluated = task.evaluate(task.init_state())
    scalars = {name for name, value in evaluated.items() if isinstance(value, float)}
    assert scalars == set(task.metrics) and ("ssim" in scalars) == expected
