"""Every config in configs/ builds its model abstractly and carries a docstring with its command."""

import dataclasses
import importlib
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from mvar_jax import build
from mvar_jax.errors import InputError
from mvar_jax.models.init import abstract_params
from mvar_jax.training.loop import LoopSettings
from mvar_jax.training.task import RunOptions

CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


def load(name: str) -> dict:
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_model_abstractly(name):
    params = nn.meta.unbox(abstract_params(build.build_module(load(name))))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1000


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_run_and_settings(name):
    config = load(name)
    assert build.build_run(config).num_steps == build.build_settings(config).num_steps == config["num_steps"]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_docstring_states_command_and_hardware(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"configs/{name}.py" in text and "Hardware:" in text


def test_misspelt_key_is_refused_with_the_nearest_one():
    config = load("digits")
    config["optimizer"]["wieght_decay"] = 0.1
    with pytest.raises(InputError, match="unknown key config.optimizer.wieght_decay. Did you mean weight_decay"):
        build.build_run(config)


def test_key_of_the_other_task_is_refused():
    config = load("digits") | {"codebook": {}}
    with pytest.raises(InputError, match="config.codebook"):
        build.build_module(config)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"kernel_size": (3, 4)}, "config.model.kernel_size"),
        ({"sides": (1, 2, 2, 4, 6, 8)}, "config.model.sides"),
        ({"refine_step": 7}, "config.model.refine_step"),
        ({"num_heads": 5}, "config.model.num_heads"),
        ({"deptth": 5}, "config.model.deptth"),
    ],
)
def test_model_value_out_of_range_names_its_field(change, field):
    config = load("digits")
    config["model"] |= change
    with pytest.raises(InputError, match=field) as caught:
        build.build_module(config)
    assert caught.value.field == field


def test_scales_that_do_not_end_at_the_latent_side_are_refused_with_both():
    config = load("digits_tokenizer")
    config["model"]["sides"] = (1, 2, 3, 5, 7)
    with pytest.raises(InputError, match=r"config.model.sides.*\b8\b.*32") as caught:
        build.build_module(config)
    assert caught.value.field == "config.model.sides" and caught.value.given == (1, 2, 3, 5, 7)


def test_optional_keys_are_the_fields_with_a_default_and_the_steps_that_epochs_replace():
    plain = [field for cls in (LoopSettings, RunOptions) for field in dataclasses.fields(cls)]
    with_default = {field.name for field in plain if field.default is not dataclasses.MISSING}
    assert set(build.OPTIONAL_KEYS) == {"num_steps", *with_default}


def test_optional_keys_mean_their_defaults_unless_given():
    optional = set(build.OPTIONAL_KEYS) - {"num_steps"}
    config = {name: value for name, value in load("debug").items() if name not in optional}
    assert build.build_run(config) == build.build_run(config | {"accumulate_steps": 1})
    assert build.build_run(config | {"accumulate_steps": 2}).accumulate_steps == 2
    assert build.build_settings(config) == build.build_settings(config | {"keep_best": "", "profile_steps": ()})
    assert build.build_settings(config | {"keep_best": "loss"}).keep_best == "loss"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "vae"}, "config.task must be tokenizer or transformer or refiner, got 'vae'"),
        ({"model": 3}, "config.model must be a section of keys, got 3"),
        ({"num_steps": {}}, "config.num_steps must be a plain value, got {}"),
        ({"num_step": 3}, "unknown key config.num_step. Did you mean num_steps"),
        ({"zzz": 3}, "unknown key config.zzz; known keys are accumulate_steps, batch_size, "),
    ],
)
def test_config_of_another_form_is_refused(change, words):
    with pytest.raises(InputError, match=words) as caught:
        build.check_config(load("digits") | change)
    assert caught.value.field == f"config.{next(iter(change))}"


def test_missing_key_is_named():
    config = load("digits")
    del config["seed"], config["model"]["width"]
    with pytest.raises(InputError, match=r"^config\.seed is missing"):
        build.check_config(config)
    with pytest.raises(InputError, match=r"^config\.model\.width is missing and has no default"):
        build.build_module(config | {"seed": 0})


@pytest.mark.parametrize(
    ("source", "field", "value"),
    [("digits", "crop", "random"), ("digits", "flip", True), ("folder", "degrees", 5.0), ("tars", "name", "mnist")],
)
def test_data_field_without_a_meaning_for_the_source_is_refused(source, field, value):
    with pytest.raises(InputError, match=f"config.data.{field} has no meaning for data.source={source}") as caught:
        build.DataOptions(source=source, image_size=32, **{field: value})
    assert caught.value.field == f"config.data.{field}" and caught.value.given == value


# name -> (epochs, batch, steps, warm-up) of the published recipe on the 1,281,167 images of ImageNet
PUBLISHED = {
    "imagenet256_d16": (300, 448, 858_000, 17_160),
    "imagenet256_d16_finetune": (80, 448, 228_800, 4_576),
    "imagenet256_d20": (250, 192, 1_668_250, 33_365),
    "imagenet256_d20_finetune": (80, 192, 533_840, 10_677),
    "imagenet256_d24": (350, 448, 1_001_000, 20_020),
    "imagenet256_d24_finetune": (80, 448, 228_800, 4_576),
    "imagenet256_d30": (350, 1024, 438_200, 8_764),
    "imagenet256_var_d16": (200, 768, 333_800, 6_676),
    "imagenet512_d16": (300, 192, 2_001_900, 40_038),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_of_the_published_recipes_follow_from_their_epochs(name):
    config = load(name)
    run = build.build_run(config).with_images(1_281_167)
    epochs, batch_size, num_steps, warmup = PUBLISHED[name]
    assert (config["epochs"], run.batch_size) == (epochs, batch_size)
    assert (run.num_steps, run.optimizer.warmup_steps) == (num_steps, warmup)
    kept = build.with_steps(config, run)
    assert kept["num_steps"] == num_steps and kept["optimizer"]["warmup_steps"] == warmup
    assert kept["epochs"] == epochs


@pytest.mark.parametrize(("batch_size", "num_images"), [(64, 1_281_167), (448, 1000), (7, 7)])
def test_epochs_count_passes_whatever_batch_and_data(batch_size, num_images):
    config = load("imagenet256_d16") | {"batch_size": batch_size, "epochs": 2.5}
    config["optimizer"] |= {"warmup_epochs": 0.5}
    run = build.build_run(config).with_images(num_images)
    steps_per_epoch = -(-num_images // batch_size)
    assert run.num_steps == round(2.5 * steps_per_epoch)
    assert run.optimizer.warmup_steps == round(0.5 * steps_per_epoch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 5}, "exactly one of config.num_steps and config.epochs must be above 0, got 5 and 300.0"),
        ({"epochs": 0.0}, "exactly one of config.num_steps and config.epochs must be above 0, got 0 and 0.0"),
        ({"epochs": -1.0}, "config.epochs must be a number of at least 0, got -1.0"),
        ({"epochs": "many"}, "config.epochs must be a number of at least 0, got 'many'"),
        ({"epochs": 6.0}, "config.optimizer.warmup_epochs must be below config.epochs=6.0, got 6.0"),
    ],
)
def test_epochs_and_steps_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        build.build_run(load("imagenet256_d16") | change)


def test_warm_up_in_both_units_is_refused():
    config = load("imagenet256_d16")
    config["optimizer"] |= {"warmup_steps": 10}
    with pytest.raises(InputError, match="only one of config.optimizer.warmup_steps and .*, got 10 and 6.0; set the"):
        build.build_run(config)


def test_warm_up_in_epochs_that_is_no_shorter_than_the_steps_is_refused_once_the_data_are_open():
    config = load("digits")
    config["optimizer"] |= {"warmup_steps": 0, "warmup_epochs": 30.0}
    with pytest.raises(InputError, match="warmup_epochs must be below 20, the epochs of 900 steps .*, got 30"):
        build.build_run(config).with_images(1437)
