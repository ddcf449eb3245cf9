"""What may differ from the run that began: nothing that changes what is learned, once there is a checkpoint."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mvar_jax.data.sources import ArraySource
from mvar_jax.errors import InputError
from mvar_jax.fields import flatten
from mvar_jax.files.paths import as_path
from mvar_jax.training import resume_rules
from mvar_jax.training.resume_rules import check_allowed, check_resumable, describe_change, keep_identity, rules_of

DATA = {"train": {"num_items": 40}, "val": {"num_items": 10}}


def load(name: str) -> dict:
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


def change(config: dict, key: str, value) -> dict:
    """Return the config with one key such as "data.path" set."""
    first, _, rest = key.partition(".")
    return config | {first: change(config.get(first, {}), rest, value) if rest else value}


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """The workdir of a run of `debug_transformer` with a checkpoint."""
    keep_identity(tmp_path, load("debug_transformer"), DATA)
    monkeypatch.setattr(resume_rules, "has_checkpoint", lambda workdir: True)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log_every_steps", 7),
        ("keep_checkpoints", 9),
        ("keep_best", "loss"),
        ("profile_steps", (1, 2)),
        ("accumulate_steps", 2),
        ("init_from", "elsewhere"),
        ("data.cache", "/mnt/other/tokens"),
        ("data.cache_memory_mib", 1),
        ("data.num_threads", 8),
        ("data.num_workers", 3),
        ("data.max_bad_share", 0.5),
        ("model.window_backend", "block"),
        ("model.remat", "full"),
        ("model.scan_unroll", 2),
        ("mesh.fsdp", 8),
    ],
)
def test_what_does_not_change_learning_may_change(workdir, key, value):
    changed = change(load("debug_transformer"), key, value)
    check_resumable(workdir, changed, DATA)
    keep_identity(workdir, changed, DATA)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(changed))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.depth", 9, "config.model.depth is 9, but the run in .* has 2; choose another workdir"),
        ("model.sides", (1, 3), r"config.model.sides is \[1, 3\], but the run in .* has \[1, 2, 4\]"),
        ("optimizer.beta1", 0.8, "config.optimizer.beta1 is 0.8, .* has 0.9; pass --allow_change=optimizer.beta1 to"),
        ("model.dtype", "bfloat16", "config.model.dtype is 'bfloat16', but the run in .* has 'float32'"),
        ("num_steps", 13, "config.num_steps is 13, but the run in .* has 12; pass --allow_change=num_steps to go on"),
        ("data.source", "digits", "config.data.source is 'digits', but .* has 'synthetic'"),
    ],
)
def test_what_changes_learning_is_refused_and_nothing_written(workdir, key, value, message):
    before = {path: path.read_bytes() for path in workdir.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        check_resumable(workdir, change(load("debug_transformer"), key, value), DATA)
    assert caught.value.field == f"config.{key}"
    assert {path: path.read_bytes() for path in workdir.iterdir()} == before


def test_all_changes_that_an_option_permits_are_named_unless_another_is_not_permitted(workdir):
    config = change(change(load("debug_transformer"), "optimizer.beta1", 0.8), "phases.ratio", 3)
    with pytest.raises(InputError, match="pass --allow_change=optimizer.beta1,phases.ratio to go on"):
        check_resumable(workdir, config, DATA)
    with pytest.raises(InputError, match="config.seed is 9, .*; choose another workdir for another run"):
        check_resumable(workdir, change(config, "seed", 9), DATA)


def test_allowed_changes_are_noted_once_and_stay(workdir, monkeypatch):
    monkeypatch.setattr(resume_rules, "list_steps", lambda folder: [4, 8])
    config = change(change(load("debug_transformer"), "optimizer.beta1", 0.8), "num_steps", 20)
    allowed = ["optimizer.beta1", "num_steps", "batch_size"]
    changes = check_resumable(workdir, config, DATA, allowed)
    assert sorted((one["key"], one["step"], one["from"], one["to"]) for one in changes) == [
        ("num_steps", 8, 12, 20),
        ("optimizer.beta1", 8, 0.9, 0.8),
    ]
    keep_identity(workdir, config, DATA, changes)
    assert check_resumable(workdir, config, DATA) == []
    keep_identity(workdir, config | {"config_arg": "big"}, DATA)
    kept = json.loads((workdir / "config.json").read_text())
    assert [set(one) for one in kept["history"]] == [{"time", "step", "key", "from", "to"}] * 2
    assert kept["config_arg"] == "big" and check_resumable(workdir, config, DATA) == []
    monkeypatch.setattr(resume_rules, "has_checkpoint", lambda workdir: False)
    keep_identity(workdir, config, DATA)
    assert "history" not in json.loads((workdir / "config.json").read_text()), "another run begins"


def test_a_run_at_its_end_may_be_extended_and_never_ends_before_its_checkpoints(workdir, monkeypatch):
    longer, shorter = (change(load("debug_transformer"), "num_steps", num) for num in (13, 7))
    monkeypatch.setattr(resume_rules, "list_steps", lambda folder: [8, 12])
    assert check_resumable(workdir, longer, DATA) == [{"step": 12, "key": "num_steps", "from": 12, "to": 13}]
    with pytest.raises(InputError, match="config.num_steps is 7, but .* has 12; pass --allow_change=num_steps"):
        check_resumable(workdir, shorter, DATA)
    with pytest.raises(InputError, match="config.num_steps must be at least 12, the step that the run .*, got 7"):
        check_resumable(workdir, shorter, DATA, ["num_steps"])


def test_an_average_that_the_checkpoints_hold_stays(workdir):
    config = change(load("debug_transformer"), "optimizer.ema_decay", 0.0)
    with pytest.raises(
        InputError, match="config.optimizer.ema_decay must be above 0, since the checkpoints .*, got 0"
    ):
        check_resumable(workdir, config, DATA, ["optimizer.ema_decay"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "model.depth",
            "--allow_change must name num_steps, batch_size or a key of optimizer, ",
        ),
        (
            "optimizer.base_learing_rate",
            "unknown key config.optimizer.base_learing_rate. Did you mean ",
        ),
        ("codebook.simvq", r"--allow_change must name .*, got codebook.simvq, which cannot change in a run; "),
    ],
)
def test_key_that_may_not_change_is_refused_by_name(key, message):
    check_allowed(["optimizer.base_learning_rate", "data.path"], "transformer")
    with pytest.raises(InputError, match=f"^{message}"):
        check_allowed([key], "transformer")


def test_a_key_that_is_not_written_counts_as_its_default_on_either_side(workdir):
    old, new = load("debug_transformer"), load("debug_transformer")
    for key, value in {"optimizer.eps": 1e-8, "data.upright": True, "model.dtype": "float32"}.items():
        new = change(new, key, value)
    check_resumable(workdir, new, DATA)
    keep_identity(workdir, new, DATA)
    check_resumable(workdir, old, DATA)
    with pytest.raises(InputError, match="config.optimizer.eps is 1e-06, but the run in .* has 1e-08"):
        check_resumable(workdir, change(old, "optimizer.eps", 1e-6), DATA)


def test_a_key_that_this_version_no_longer_has_is_named(workdir):
    keep_identity(workdir, change(load("debug_transformer"), "optimizer.nesterov", True), DATA)
    words = r"the run in .* has config.optimizer.nesterov=True, a key that this version does not know; continue with"
    with pytest.raises(InputError, match=words) as caught:
        check_resumable(workdir, load("debug_transformer"), DATA)
    assert caught.value.field == "config.optimizer.nesterov"


@pytest.mark.parametrize("task", ["tokenizer", "transformer"])
def test_every_key_of_the_shipped_configs_has_a_rule(task):
    for path in Path("configs").glob("[!_]*.py"):
        config = load(path.stem)
        if config["task"] == task:
            assert not {key for key, _ in flatten(config)} - rules_of(task).keys()


def test_before_a_checkpoint_nothing_binds(tmp_path):
    keep_identity(tmp_path, load("debug"), DATA)
    check_resumable(tmp_path, load("digits"), {})
    keep_identity(tmp_path, load("digits"), {})
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 32
    assert json.loads((tmp_path / "data_identity.json").read_text()) == {}


def test_other_data_at_the_same_or_another_place_are_refused(workdir):
    other = DATA | {"train": {"num_items": 41}}
    words = "config.data must name the data of the run .*, which had 40 train images, not 41; name the same data, or"
    for config in (load("debug_transformer"), change(load("debug_transformer"), "data.cache", "elsewhere")):
        with pytest.raises(InputError, match=words):
            check_resumable(workdir, config, other)


def test_data_that_grew_are_named_before_the_steps_that_follow_from_them(workdir):
    config = change(load("debug_transformer"), "epochs", 2)
    keep_identity(workdir, config, DATA)
    with pytest.raises(InputError, match="which had 40 train images, not 41; name the same data"):
        check_resumable(workdir, change(config, "num_steps", 13), DATA | {"train": {"num_items": 41}})


def test_what_only_one_version_notes_of_the_data_is_not_compared(workdir):
    train = DATA["train"] | {"files": "abc"}
    check_resumable(workdir, load("debug_transformer"), {"train": train})  # nor a validation split that is gone
    keep_identity(workdir, load("debug_transformer"), {"train": train})
    check_resumable(workdir, load("debug_transformer"), DATA)
    with pytest.raises(InputError, match="whose train images had other names; name the same data"):
        check_resumable(workdir, load("debug_transformer"), {"train": train | {"files": "def"}})


def test_a_run_that_noted_no_data_may_not_move_before_it_has(workdir):
    (workdir / "data_identity.json").unlink()
    moved = change(load("debug_transformer"), "data.cache", "elsewhere")
    with pytest.raises(InputError, match="config.data.cache changed, .* resume it once with the old value") as caught:
        check_resumable(workdir, moved, DATA)
    assert caught.value.field == "config.data.cache"
    check_resumable(workdir, load("debug_transformer"), DATA)
    keep_identity(workdir, load("debug_transformer"), DATA)
    check_resumable(workdir, moved, DATA)


def test_unreadable_files_of_a_run_are_refused(workdir):
    (workdir / "config.json").write_text("{")
    with pytest.raises(InputError, match="workdir .* has no readable config.json: "):
        check_resumable(workdir, load("debug_transformer"), DATA)


def test_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir .*file/run cannot be written: "):
        keep_identity(tmp_path / "file" / "run", load("debug"), DATA)


def test_identity_tells_data_by_number_classes_and_names(tmp_path):
    make = lambda num, classes, cls=ArraySource: cls(np.zeros((num, 2)), np.zeros(num, int), classes).identity()

    class Named(ArraySource):
        def name_of(self, index):
            return os.fsdecode(b"\xff") + str(2 * index)

    same = make(100, ("a", "b"))
    assert same == make(100, ("a", "b")) == json.loads(json.dumps(same))
    others = [make(101, ("a", "b")), make(100, ("b", "a")), make(100, ("ab",)), make(100, ("a", "b"), Named)]
    assert all(other != same for other in others)


def test_config_is_kept_and_checked_in_a_store(store, monkeypatch):
    workdir = as_path(store.url) / "resume_rules"
    keep_identity(workdir, load("debug_transformer"), DATA)
    assert workdir.find() == ["config.json", "data_identity.json"]
    monkeypatch.setattr(resume_rules, "has_checkpoint", lambda workdir: True)
    check_resumable(workdir, load("debug_transformer"), DATA)
    with pytest.raises(InputError, match=f"config.seed is 9, but the run in {workdir} has 0"):
        check_resumable(workdir, change(load("debug_transformer"), "seed", 9), DATA)


@pytest.mark.parametrize(
    ("num_images", "new", "words"),
    [
        (
            6400,
            64,
            "after 0 of the 6,400 images of epoch 2, as if all steps had had this size, so images are s",
        ),
        (
            3000,
            16,
            "after 1,600 of the 3,000 images of epoch 1, as if all steps had had this size, so images are r",
        ),
        (None, 16, "after 1,600 images, as if"),
    ],
)
def test_another_batch_size_says_where_the_stream_goes_on(num_images, new, words):
    change = {"step": 100, "key": "batch_size", "from": 32, "to": new}
    assert f"config.batch_size is {new} instead of 32; the stream goes on {words}" in describe_change(
        num_images, **change
    )
