"""Config files by path and by name, from any folder, and what they import."""

import sys
from pathlib import Path

import pytest

from mvar_jax.cli.config_files import find_config, shipped_folder, shipped_names, split_argument
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
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
    read_config("imagenet256_d16", [])
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"} == before


@pytest.mark.parametrize("name", ["digts", "there/digts.py"])
def test_unknown_config_is_refused_with_the_shipped_names(elsewhere, name):
    with pytest.raises(InputError, match=f"{', '.join(shipped_names())}, got {name}. Did you mean digits?") as caught:
        read_config(name, [])
    assert caught.value.field == "config" and caught.value.given == name


def test_config_in_an_object_store_is_refused():
    with pytest.raises(InputError, match="config must be a path of this machine's file systems, since it is"):
        find_config("gs://bucket/my.py")


TAKES_AN_ARGUMENT = """
from configs import debug

def get_config(sizes):
    config = debug.get_config()
    config.model.width, config.seed = map(int, sizes.split(":"))
    return config
"""


def test_argument_after_a_colon_goes_to_get_config(elsewhere):
    for name in ("own.py", "a:b.py"):
        (elsewhere / name).write_text(TAKES_AN_ARGUMENT)
        config = read_config(f"{name}:24:7", ["--config.seed=8"])
        assert config["model"]["width"] == 24 and config["seed"] == 8, "the rest of the text is the argument"
        assert split_argument(f"{name}:24:7") == (name, "24:7") and split_argument(name) == (name, None)
    assert split_argument("digits:big") == ("digits", "big")


FAILING = {
    "x = 1\ny = lerning_rate": "in line 2: NameError: name 'lerning_rate' is not defined",
    "def get_config(:": "in line 1: SyntaxError: ",
    "import torchh": "in line 1: ModuleNotFoundError: No module named 'torchh'",
    "from configs import debugg": "in line 1: ImportError: cannot import name 'debugg'",
    "import sys\ndef get_config():\n    sys.exit(0)": "in line 3: SystemExit: 0",
    "def get_config():\n    return open('nowhere.txt')": "in line 2: FileNotFoundError: .*nowhere.txt",
    "def get_config():\n    return get_config()": "in line 2: RecursionError",
    "from configs import broken\n": "in line 1 of .*broken.py: ZeroDivisionError: division by zero",
    "x = 1": r"must have a function get_config\(\)",
    "get_config = 3": r"must have a function get_config\(\)",
    "get_config = lambda: None": r"must return an ml_collections.ConfigDict from get_config\(\), got None",
    "get_config = lambda: 3": r"must return .*, got int 3",
    "def get_config(size):\n    pass": "needs an argument for its get_config: pass --config=.*own.py:ARG",
}


@pytest.mark.parametrize("text", FAILING)
def test_whatever_fails_in_a_config_file_is_one_sentence_with_its_line(elsewhere, text):
    (elsewhere / "broken.py").write_text("1 / 0")
    (elsewhere / "own.py").write_text(text)
    beginning = "(cannot be read )?"
    with pytest.raises(InputError, match=f"^config file own.py {beginning}{FAILING[text]}") as caught:
        read_config("own.py", [])
    assert caught.value.field == "config" and "\n" not in str(caught.value)


def test_argument_that_get_config_does_not_take_is_refused():
    with pytest.raises(InputError, match=r"digits.py has a get_config\(\) that takes no argument, got 'big': pass"):
        read_config("digits:big", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizr.beta1=1", "config.optimizr is no section of the config, .* Did you mean config.optimizer?"),
        ("seed.x=1", "config.seed is no section of the config, .*; sections are codebook, data, mesh, "),
        ("=1", "--config. must name a key of config"),
        ("seed", "--config.seed needs a value"),
    ],
)
def test_override_of_no_key_is_refused(override, message):
    with pytest.raises(InputError, match=f"^{message}"):
        read_config("debug", [f"--config.{override}"])


def test_overrides_are_text_numbers_and_tuples_as_in_the_file_and_reach_references(elsewhere):
    (elsewhere / "own.py").write_text(
        "import ml_collections as ml\n\ndef get_config():\n    c = ml.ConfigDict(dict(a=1, name='x', sides=(1, 2)))\n"
        "    c.twice = c.get_ref('a') * 2\n    c.inner = dict(b=None, flag=False)\n    return c\n"
    )
    given = ["a=3", "name=4", "sides=(3,5)", "sides=7", "inner.b=0.5", "inner.flag=true", "new='text'"]
    assert read_config("own.py", [f"--config.{one}" for one in given]) == dict(
        a=3, name="4", sides=(3, 5, 7), twice=6, inner=dict(b=0.5, flag=True), new="text"
    )
