"""A whole tiny run on the digits, made once through the commands themselves."""

import fcntl
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvar_jax.__main__ import main

REPOSITORY = Path(__file__).parent.parent.parent

OFTEN = [
    "--config.save_every_steps=2",
    "--config.keep_checkpoints=3",
    "--config.log_every_steps=1",
    "--config.picture_every_steps=0",
]
# 1 + 4 + 9 + 36 tokens, the last scale a fine one
SIZES = ["--config.data.image_size=12", "--config.model.sides=(1,2,3,6)", "--config.model.vocab_size=32"]
SMALL_TOKENIZER = [
    *OFTEN,
    "--config.num_steps=3",
    "--config.batch_size=8",
    "--config.data.size=24",
    *SIZES,
    "--config.model.ch=4",
    "--config.model.ch_mult=(1,2)",
    "--config.codebook.warmup_steps=1",
    "--config.optimizer.warmup_steps=1",
]
SMALL_TRANSFORMER = [
    *OFTEN,
    "--config.num_steps=3",
    "--config.batch_size=8",
    "--config.data.size=24",
    "--config.data.num_views=2",
    *SIZES,
    "--config.model.refine_step=3",
    "--config.model.kernel_size=3",
    "--config.model.width=24",
    "--config.model.depth=2",
    "--config.optimizer.warmup_steps=1",
]


@pytest.fixture(scope="session")
def run(shared_folder):
    """Directories of a finished run: tokenizer, tokens, transformer; and the arguments that made them.

    Test processes share it: the first one makes it, the others wait.
    """
    with (shared_folder / "run.lock").open("w") as lock:
        wait_for_lock(lock, time.monotonic() + 300)
        return make_run(shared_folder / "run")


def wait_for_lock(lock, deadline_s: float) -> None:
    """Lock a file for this process alone. Raises BlockingIOError if another one still holds it at the deadline."""
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.1)


def make_run(root: Path):
    is_made = root.exists()
    tokenizer, tokens, transformer = (str(root / name) for name in ("tokenizer", "tokens", "transformer"))
    configs = REPOSITORY / "configs"
    train_tokenizer = ["train", "--config", str(configs / "digits_tokenizer.py"), *SMALL_TOKENIZER]
    small = [*SMALL_TRANSFORMER, f"--config.data.cache={tokens}"]
    cache = ["cache_tokens", "--config", str(configs / "digits.py"), *small, "--tokenizer", tokenizer]
    train_transformer = ["train", "--config", str(configs / "digits.py"), *small]
    if not is_made:
        assert main([*train_tokenizer, "--workdir", tokenizer]) == 0
        assert main([*cache, "--out", tokens]) == 0
        assert main([*train_transformer, "--workdir", transformer]) == 0
    return SimpleNamespace(
        root=root,
        tokenizer=tokenizer,
        tokens=tokens,
        transformer=transformer,
        train_tokenizer=train_tokenizer,
        train_transformer=train_transformer,
        cache=cache,
        tokenizer_flags=SMALL_TOKENIZER,
        transformer_flags=SMALL_TRANSFORMER,
    )


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working directory of a test on object stores, in which no folder called s3: or gs: may appear."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert os.listdir(folder) == []
