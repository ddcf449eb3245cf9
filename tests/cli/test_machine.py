import os

import jax
import numpy as np
import pytest

from mvar_jax import api
from mvar_jax.__main__ import main
from mvar_jax.cli import machine
from mvar_jax.errors import InputError
from mvar_jax.files.images import save_png


class Config:
    """Stands for jax.config: notes what is set."""

    def __init__(self, folder):
        self.jax_compilation_cache_dir = folder
        self.values = {}
        self.update = self.values.__setitem__


@pytest.mark.parametrize("has_variable", [False, True])
def test_compiled_programs_are_kept_by_default_and_where_asked(monkeypatch, tmp_path, has_variable):
    config = Config("/mine" if has_variable else None)
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.use_compilation_cache("auto")
    folder = config.values.pop("jax_compilation_cache_dir", "")
    assert folder.startswith("" if has_variable else os.path.join(tmp_path, "mvar_jax", "jax-"))
    assert bool(folder) != has_variable, "JAX's own variable is left alone"
    machine.use_compilation_cache(str(tmp_path / "here"))
    assert config.values.pop("jax_compilation_cache_dir") == str(tmp_path / "here")
    machine.use_compilation_cache("off")
    assert config.values == {"jax_enable_compilation_cache": False}


COMMANDS = {
    "sample": ["--checkpoint={model}", "--labels=0"],
    "edit": ["--checkpoint={model}", "--image={image}", "--mask={image}", "--label=0"],
    "reconstruct": ["--checkpoint={model}", "--images={image}"],
    "sweep": ["--checkpoint={model}"],
    "cache_tokens": ["--tokenizer={model}", "--config=digits"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_runs_a_model_runs_it_in_the_precision_that_is_asked_for(
    command, tiny_model, tmp_path, monkeypatch
):
    asked = []

    def load(path, which="last", tokenizer=None, precision=None, refiner="on", refine_scales=None, switch=None):
        asked.append(precision)
        raise InputError("seen", field="checkpoint")

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(jax, "config", Config("/mine"))
    image = tmp_path / "image.png"
    save_png(image, np.zeros((6, 6, 3), np.uint8))
    options = [option.format(model=tiny_model, image=image) for option in COMMANDS[command]]
    assert main([command, *options, f"--out={tmp_path / 'out'}", "--precision=exact"]) == 2
    assert asked == ["exact"]
