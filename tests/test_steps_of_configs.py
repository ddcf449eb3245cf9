"""The steps of a run: given, or as epochs of its data."""

import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config

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
