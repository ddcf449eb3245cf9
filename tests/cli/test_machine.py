import os

import jax
import pytest

from mvar_jax.cli import machine
from mvar_jax.errors import InputError

VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
EXPECTED = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}


def test_processes_are_those_of_the_option_or_of_the_variables_or_for_jax_to_find():
    assert machine.parse_distributed("a:1,2,1", {}) == EXPECTED
    assert machine.parse_distributed("auto", VARIABLES) == EXPECTED
    assert machine.parse_distributed("auto", {}) == {}


@pytest.mark.parametrize("option", ["on", "a:1", "a,2,0", "a:1,2,2", "a:1,two,0"])
def test_processes_that_cannot_be_meant_are_refused(option):
    with pytest.raises(InputError, match="distributed must be .*HOST:PORT,NUM,INDEX.*, got") as caught:
        machine.parse_distributed(option, {})
    assert caught.value.field == "distributed" and caught.value.given == option


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
