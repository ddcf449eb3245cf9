"""The model of the notebooks: the one they name or, if the quickstart has not run, a small one trained on digits."""

import importlib.util
import os
from pathlib import Path

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.api import Model
from mvar_jax.cli.machine import use_compilation_cache

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "runs/quickstart/transformer"
SMALL = "runs/notebook"
# smaller models and fewer steps than the quickstart's: enough to see digits, in about two minutes
TOKENIZER_FLAGS = (
    "--config.num_steps=120",
    "--config.picture_every_steps=-1",
    "--config.eval_every_steps=120",
    "--config.save_every_steps=40",
    "--config.model.ch=8",
    "--config.codebook.revive_until_step=70",
)
TRANSFORMER_FLAGS = (
    "--config.num_steps=200",
    "--config.picture_every_steps=-1",
    "--config.eval_every_steps=200",
    "--config.save_every_steps=50",
    "--config.data.num_views=2",
    "--config.model.depth=3",
    "--config.model.width=64",
    "--config.model.num_heads=2",
)


CPU_FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1"


def use_cpu_well() -> None:
    """Set the XLA flags of launch/quickstart.sh if there is no accelerator; no effect once JAX has started."""
    if importlib.util.find_spec("jax_plugins") is None:
        os.environ.setdefault("XLA_FLAGS", CPU_FLAGS)


def run(command: str, *arguments: str) -> None:
    """Run a command of `python -m mvar_jax` in this process. Raises RuntimeError if it fails."""
    status = main([command, *arguments])
    if status:
        raise RuntimeError(f"mvar {command}: exit status {status}")


def train_digits(folder: Path, tokenizer_flags=TOKENIZER_FLAGS, transformer_flags=TRANSFORMER_FLAGS) -> Path:
    """Train a tokenizer, then a transformer, as launch/quickstart.sh; return the transformer's workdir."""
    use_cpu_well()
    configs = ROOT / "configs"
    tokenizer, tokens, transformer = (folder / name for name in ("tokenizer", "tokens", "transformer"))
    digits = [f"--config={configs / 'digits.py'}", *transformer_flags, f"--config.data.cache={tokens}"]
    run("train", f"--config={configs / 'digits_tokenizer.py'}", *tokenizer_flags, "--workdir", str(tokenizer))
    run("cache_tokens", *digits, "--tokenizer", str(tokenizer), "--out", str(tokens))
    run("train", *digits, "--workdir", str(transformer))
    return transformer


def load(path: str) -> Model:
    """Load a model by its path in the repository; train the small one if the quickstart's does not exist."""
    use_compilation_cache("auto")
    if path == QUICKSTART and not (ROOT / path).exists():
        return mvar_jax.load(train_digits(ROOT / SMALL))
    return mvar_jax.load(ROOT / path)
