import json
import os

import pytest

from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path
from mvar_jax.training.workdir import check_config

CONFIG = {"depth": 8, "sides": (1, 2), "train": {"lr": 0.1, "log_every_steps": 5}, "mesh": {"data": 2}}


def test_config_may_change_only_where_learning_does_not(tmp_path):
    workdir = tmp_path / "a/run"
    check_config(workdir, CONFIG)
    changed = CONFIG | {"train": {"lr": 0.1, "log_every_steps": 7}, "mesh": {"data": 8}}
    check_config(workdir, changed)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(changed))
    assert os.listdir(workdir) == ["config.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 9}, "config.depth is 9, but the run in .* has 8; choose another workdir"),
        ({"train": {"lr": 0.2, "log_every_steps": 5}}, "config.train.lr is 0.2, but the run in .* has 0.1"),
        ({"sides": (1, 3)}, r"config.sides is \[1, 3\], but the run in .* has \[1, 2\]"),
        ({"new": 1}, "config.new is 1, but the run in .* has None"),
    ],
)
def test_config_of_another_run_is_refused_and_nothing_written(tmp_path, change, message):
    check_config(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=message) as caught:
        check_config(tmp_path, CONFIG | change)
    assert message.startswith(caught.value.field)
    assert (tmp_path / "config.json").read_bytes() == before


def test_unusable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir .*file/run cannot be written: "):
        check_config(tmp_path / "file" / "run", CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="workdir .* has no readable config.json: "):
        check_config(tmp_path, CONFIG)


def test_workdir_in_a_store_keeps_and_checks_the_config(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"{store.url}/run"
    check_config(workdir, CONFIG)
    assert json.loads((as_path(workdir) / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    with pytest.raises(InputError, match="config.depth is 9, but the run in (s3|gs)://bucket/run has 8"):
        check_config(workdir, CONFIG | {"depth": 9})
    assert not list(tmp_path.iterdir())
