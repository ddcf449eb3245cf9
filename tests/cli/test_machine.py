import os

import jax
import pytest

from mvar_jax.cli import machine


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
