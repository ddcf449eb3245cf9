"""Config files by path and by name, from any folder, and what they import."""

import sys
from pathlib import Path

import pytest

from mvar_jax.cli.config_files import find_config, shipped_folder, shipped_names
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = """
from configs import {base}

def get_config():
    config = {base}.get_config()
    config.seed = 7
    return config
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The working directory: an empty folder outside the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shipped_configs_are_those_of_the_repository():
    assert shipped_folder() == CONFIGS
    assert {"digits", "folder", "imagenet256_d16"} < set(shipped_names()) and "_imagenet" not in shipped_names()


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_shipped_config_is_found_by_name_in_any_folder(elsewhere, name):
    assert find_config(name) == CONFIGS / "digits.py"


def test_file_comes_before_a_shipped_config_of_its_name(elsewhere):
    (elsewhere / "digits.py").write_text(OWN.format(base="folder"))
    assert read_config("digits.py", [])["seed"] == 7
    assert read_config("digits", [])["seed"] == 0


@pytest.mark.parametrize("name", ["imagenet256_d16", "debug_transformer"])
def test_shipped_config_that_imports_another_is_read_in_any_folder(elsewhere, name):
    assert read_config(name, ["--config.seed=3"])["seed"] == 3


def test_own_config_imports_its_neighbours_then_the_shipped_ones(elsewhere):
    (elsewhere / "mine.py").write_text(OWN.format(base="digits"))
    (elsewhere / "more.py").write_text(OWN.format(base="mine"))
    assert read_config("more.py", [])["data"]["source"] == "digits"


def test_configs_of_two_folders_do_not_mix(elsewhere):
    for name in ("a", "b"):
        (elsewhere / name).mkdir()
        text = f"import ml_collections as ml\n\nget_config = lambda: ml.ConfigDict(dict(x='{name}'))\n"
        (elsewhere / name / "base.py").write_text(text)
        (elsewhere / name / "top.py").write_text(OWN.format(base="base"))
    assert [read_config(f"{name}/top.py", [])["x"] for name in ("a", "b")] == ["a", "b"]


def test_reading_a_config_leaves_no_module_behind(elsewhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "configs.kept", sys)
    read_config("imagenet256_d16", [])
    assert [name for name in sys.modules if name.partition(".")[0] == "configs"] == ["configs.kept"]


@pytest.mark.parametrize("name", ["digts", "there/digts.py"])
def test_unknown_config_is_refused_with_the_shipped_names(elsewhere, name):
    with pytest.raises(InputError, match=f"{', '.join(shipped_names())}, got {name}. Did you mean digits?") as caught:
        read_config(name, [])
    assert caught.value.field == "config" and caught.value.given == name


def test_config_in_an_object_store_is_refused():
    with pytest.raises(InputError, match="config must be a path of this machine's file systems, since it is"):
        find_config("gs://bucket/my.py")
