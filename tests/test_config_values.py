"""Values of a config that have another type than their annotation, or make no sense: one sentence with the key."""

import functools
import re

import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.fields import from_dict
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.transformer_step import PhaseOptions

TOKENIZER = "debug"
TRANSFORMER = "debug_transformer"


def build_all(config: dict) -> None:
    """Build whatever a run builds from its config before it opens the data."""
    build.build_data(config)
    build.build_module(config)
    build.build_run(config)
    build.build_settings(config)
    section, cls = ("codebook", CodebookOptions) if config["task"] == "tokenizer" else ("phases", PhaseOptions)
    from_dict(cls, config[section], f"config.{section}")


@functools.cache
def check_config_is_good(name: str) -> None:
    build_all(read_config(name, []))


# config, override, what is allowed
REFUSED = [
    # of another type
    (TRANSFORMER, "optimizer.clip_norm=None", "a number of at least 0, got None"),
    (TRANSFORMER, "data.num_threads=1.5", "a whole number from 0 to 1024, got 1.5"),
    (TRANSFORMER, "data.size=None", "a whole number of at least 0, got None"),
    (TRANSFORMER, "data.flip=3", "true or false, got 3"),
    (TRANSFORMER, "data.tokenizer=3", "text, got 3"),
    (TRANSFORMER, "model.dtype=bf16", "one of float32, bfloat16, float16, got 'bf16'"),
    (TRANSFORMER, "model.sides=a", "a whole number, got 'a'"),
    (TRANSFORMER, "model.kernel_size=2.5", "a whole number or a list, each part a whole number, got 2.5"),
    (TRANSFORMER, "model.remat=None", "none, dots or full, got None"),
    (TRANSFORMER, "phases.label_smoothing=some", "a number from 0 to below 1, got 'some'"),
    (TRANSFORMER, "num_steps=many", "a whole number of at least 0, got 'many'"),
    (TRANSFORMER, "num_steps=1.5", "a whole number of at least 0, got 1.5"),
    (TRANSFORMER, "batch_size=2.5", "a whole number, got 2.5"),
    (TRANSFORMER, "seed=True", "a whole number from 0 to 4294967295, got True"),
    (TRANSFORMER, "profile_steps=x", "a whole number, got 'x'"),
    (TRANSFORMER, "mesh.data=x", "a whole number, got 'x'"),
    (TRANSFORMER, "optimizer=3", "a section of keys, got 3"),
    (TOKENIZER, "codebook.l2_weight=None", "a number of at least 0, got None"),
    (TOKENIZER, "model.num_groups=None", "set if and only if group_size=None is None, got None"),
    # out of range
    (TRANSFORMER, "optimizer.base_learning_rate=-1", "a number of at least 0, got -1.0"),
    (TRANSFORMER, "optimizer.base_learning_rate=nan", "a number of at least 0, got nan"),
    (TRANSFORMER, "optimizer.base_learning_rate=inf", "a number of at least 0, got inf"),
    (TRANSFORMER, "optimizer.beta1=2", "a number from 0 to below 1, got 2"),
    (TRANSFORMER, "optimizer.eps=0", "a number above 0, got 0"),
    (TRANSFORMER, "optimizer.ema_decay=1.0", "a number from 0 to below 1, got 1.0"),
    (TRANSFORMER, "optimizer.warmup_steps=12", "below config.num_steps=12, got 12"),
    (TRANSFORMER, "optimizer.final_weight_decay=-0.1", "a number of at least 0, got -0.1"),
    (TRANSFORMER, "seed=-1", "a whole number from 0 to 4294967295, got -1"),
    (TRANSFORMER, "batch_size=0", "a positive multiple of 1 (devices that share a batch: 1), got 0"),
    (TRANSFORMER, "mesh.fsdp=0", "a number of devices, or -1 for those that are left, got 0"),
    (
        TRANSFORMER,
        "profile_steps=(20,30)",
        "() or (first step, end) such as (10, 15), the first one below num_steps=",
    ),
    (TRANSFORMER, "model.depth=0", "a whole number of at least 1, got 0"),
    (TRANSFORMER, "model.depth=5000", "at most 4096, got 5000"),
    (TRANSFORMER, f"model.width={10**22}", f"at most 2147483647, got {10**22}"),
    (TRANSFORMER, f"optimizer.eps={10**40}", f"at most 1e+30, got {10**40}"),
    (TRANSFORMER, "data.num_views=65537", "at most 65536, got 65537"),
    (TRANSFORMER, "model.vocab_size=0", "a whole number of at least 1, got 0"),
    (TRANSFORMER, "model.num_heads=3", "a divisor of width=16, got 3"),
    (TRANSFORMER, "model.drop_path_rate=1.0", "a number from 0 to below 1, got 1.0"),
    (
        TRANSFORMER,
        "model.window_backend=fast",
        "auto, band, dense, gather, pallas_gpu, pallas_tpu, reference or tiled",
    ),
    (TOKENIZER, "model.num_groups=3", "a divisor of the channels of every level, 8, got 3"),
    (TOKENIZER, "model.group_size=0", "a whole number of at least 1, got 0"),
    (TOKENIZER, "model.ch_mult=()", "a tuple of one number for each level, got ()"),
    (TOKENIZER, f"model.ch_mult=({10**22},1)", f"at most 2147483647, got {10**22}"),
    (TOKENIZER, "model.phi_ratio=2", "a number from 0 to 1, got 2"),
    (TOKENIZER, "codebook.usage_decay=1", "a number from 0 to below 1, got 1"),
]


@pytest.mark.parametrize(("name", "override", "allowed"), REFUSED)
def test_value_of_another_type_or_out_of_range_is_refused_with_key_value_and_what_is_allowed(name, override, allowed):
    check_config_is_good(name)
    key = f"config.{override.partition('=')[0]}"
    with pytest.raises(InputError, match=rf"^{key}(\[0\])? must be {re.escape(allowed)}") as caught:
        build_all(read_config(name, [f"--config.{override}"]))
    assert caught.value.field.removesuffix("[0]") == key and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["model.class_init_std=None", "optimizer.final_weight_decay=None", "data.cache=3"]
)
def test_none_of_an_optional_key_and_any_text_are_taken(override):
    config = read_config(TRANSFORMER, ["--config.data.cache=x", f"--config.{override}"])
    build_all(config)
    (section, name), value = override.partition("=")[0].split("."), override.partition("=")[2]
    assert str(config[section][name]) == value


def test_learning_rate_that_a_file_writes_as_a_whole_number_takes_a_fraction(tmp_path):
    (tmp_path / "own.py").write_text(
        "from configs import debug\n\ndef get_config():\n    c = debug.get_config()\n"
        "    c.optimizer.base_learning_rate = 1\n    c.optimizer.final_weight_decay = None\n    return c\n"
    )
    overrides = ["--config.optimizer.base_learning_rate=0.5", "--config.optimizer.final_weight_decay=0.1"]
    options = build.build_run(read_config(str(tmp_path / "own.py"), overrides)).optimizer
    assert (options.base_learning_rate, options.final_weight_decay) == (0.5, 0.1)
