"""Fine-tuning to other classes than those of the weights that a run starts from."""

import json

import jax
import numpy as np
import pytest
import small_case
from PIL import Image

from mvar_jax import build
from mvar_jax.checkpoints.class_names import CLASSES_FILE
from mvar_jax.checkpoints.model_directory import ids_fingerprint, load_model, save_model
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path
from mvar_jax.models.networks import Networks
from mvar_jax.training.initial import load_initial


@pytest.fixture
def config(run, tmp_path) -> dict:
    """A run on folders of three classes, two of which are called like digits, from the weights of the digits' run."""
    for split, name in ((split, name) for split in ("train", "val") for name in ("3", "8", "house")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 12), (int(name == "3") * 200, 90, 30)).save(folder / "a.png")
    own = [f"data.path={tmp_path}", f"data.tokenizer={run.tokenizer}", f"init_from={run.transformer}", "seed=5"]
    own += ["model.num_heads=3", "model.code_width=16", "model.dtype=float32", "model.num_classes=0"]
    flags = [flag for flag in run.transformer_flags if "data.size" not in flag and "sides" not in flag]
    config = read_config("folder", [*flags, *(f"--config.{one}" for one in own)])
    return config | {"model": config["model"] | {"sides": (1, 2, 3, 6)}}


def test_other_classes_get_fresh_rows_and_everything_else_is_kept(run, config, capsys):
    task, modules, _ = build.build_task(config)
    state = task.init_state()
    assert modules["transformer"].num_classes == 3 and task.data["train"].label_names == ("3", "8", "house")
    there = load_model(as_path(run.transformer))[1]["transformer"]
    line = f"config.init_from={run.transformer} has 10 classes and the data have 3: the class table keeps the row of "
    assert (
        line + "no class and those of 2 classes of equal name, its other rows (1) are new; all other"
        in capsys.readouterr().out
    )
    own = build.build_task(config | {"init_from": ""})[0].init_state().params["class_embed"]
    for params in (state.params, state.ema):
        table, old = params["class_embed"], there["class_embed"]
        np.testing.assert_array_equal(table, np.stack([old[3], old[8], own[2], old[10]]))
        assert jax.tree.all(jax.tree.map(np.array_equal, {**params, "class_embed": 0}, {**there, "class_embed": 0}))


def test_same_classes_in_another_order_take_their_rows_by_name(run):
    modules, params, *_ = load_model(as_path(run.transformer))
    names = [str(digit) for digit in range(9, -1, -1)]
    initial = load_initial(run.transformer, modules["transformer"], names)
    table = np.asarray(params["transformer"]["class_embed"])
    np.testing.assert_array_equal(initial.params["class_embed"], table[[*range(9, -1, -1), 10]])
    assert "another order" in initial.note and initial.fresh_rows is None
    for others in (names[::-1], [*names[:9], "house"], []):  # the same order, as many others, no names
        initial = load_initial(run.transformer, modules["transformer"], others)
        np.testing.assert_array_equal(initial.params["class_embed"], table)
        assert not initial.note


@pytest.mark.parametrize("is_sorted_as_text", [False, True])
def test_twelve_numbered_classes_are_told_apart_in_either_order(tmp_path, is_sorted_as_text):
    """Sorted as text, 10 and 11 stand before 2: the order of folders, but not of a classes.txt."""
    model = small_case.MODEL.clone(num_classes=12)
    params = small_case.seeded_params(model)
    names = [f"c{number}" for number in range(12)]
    save_model(tmp_path / "model", {"transformer": model}, {"transformer": params})
    (tmp_path / "model" / CLASSES_FILE).write_text(json.dumps(names))
    initial = load_initial(str(tmp_path / "model"), model, sorted(names) if is_sorted_as_text else names)
    rows = [0, 1, 10, 11, *range(2, 10), 12] if is_sorted_as_text else slice(None)
    np.testing.assert_array_equal(initial.params["class_embed"], np.asarray(params["class_embed"])[rows])
    assert ("another order" in initial.note) == is_sorted_as_text


def test_number_of_classes_that_the_config_names_must_be_that_of_the_data(config):
    with pytest.raises(InputError, match="config.model.num_classes must be 3, .*, got 10; 0 takes the number from"):
        build.build_task(config | {"model": config["model"] | {"num_classes": 10}})


def test_another_parameter_of_another_shape_is_refused(config):
    with pytest.raises(InputError, match="must have transformer .* of shape"):
        build.build_task(config | {"model": config["model"] | {"width": 48}})


def test_initial_weights_that_do_not_exist_are_refused_by_their_key(config, tmp_path):
    with pytest.raises(InputError, match="config.init_from=.*none.pth") as caught:
        build.build_task(config | {"init_from": str(tmp_path / "none.pth")})
    assert caught.value.field == "config.init_from"


def test_weights_that_were_trained_with_a_tokenizer_of_other_ids_are_taken_with_a_note(run):
    modules, params = load_model(as_path(run.transformer))
    names = [str(digit) for digit in range(10)]
    own = Networks(modules["tokenizer"], params["tokenizer"])
    assert load_initial(run.transformer, modules["transformer"], names, own).note == ""
    other = own.replace(tokenizer_params={**params["tokenizer"], "codebook": params["tokenizer"]["codebook"] + 1})
    initial = load_initial(run.transformer, modules["transformer"], names, other)
    ids = [ids_fingerprint(x.tokenizer, x.tokenizer_params) for x in (own, other)]
    words = f"config.init_from={run.transformer} was trained with a tokenizer of other ids than the data's "
    assert initial.note == words + f"({ids[0]} and {ids[1]}): its weights have to learn the new ids"
