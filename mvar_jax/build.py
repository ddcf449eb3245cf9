"""The one door from an ml_collections config to modules, data and tasks. No ConfigDict goes below this file."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError

# key -> whether it is a section; every config has exactly these
COMMON_KEYS = {
    "task": False,
    "seed": False,
    "num_steps": False,
    "batch_size": False,
    "log_every_steps": False,
    "eval_every_steps": False,
    "picture_every_steps": False,
    "save_every_steps": False,
    "keep_checkpoints": False,
    "max_bad_steps": False,
    "data": True,
    "model": True,
    "optimizer": True,
    "mesh": True,
}
SPLITS = ("train", "val")
# what a config without the key means
OPTIONAL_KEYS = {"accumulate_steps": 1, "keep_best": "", "profile_steps": ()}
TASK_KEYS = {"tokenizer": {"codebook": True}, "transformer": {"phases": True, "init_from": False}}


def fill(cls: type, section: str, values: dict) -> Any:
    """A frozen dataclass from a config section. Raises InputError for an unknown or missing key."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    check_keys(f"config.{section}", values, known)
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise InputError(f"config.{section}.{name}", None, "a value: it has no default")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def check_keys(where: str, values: dict, known) -> None:
    """Raises InputError naming the first key that is not known, and the nearest one that is."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"{where}.{near[0]}, perhaps" if near else f"one of {', '.join(sorted(known))}"
            raise InputError(f"{where}.{name}", values[name], f"a known key: {hint}")


def check_config(config: dict) -> None:
    """Raises InputError unless the config has every common key, its task's section and nothing else."""
    if config.get("task") not in TASK_KEYS:
        raise InputError("config.task", config.get("task"), f"one of {', '.join(TASK_KEYS)}")
    known = COMMON_KEYS | TASK_KEYS[config["task"]]
    check_keys("config", config, known | OPTIONAL_KEYS)
    for name, is_section in known.items():
        if name not in config:
            raise InputError(f"config.{name}", None, "a value: every config has it")
        if is_section != isinstance(config[name], dict):
            raise InputError(f"config.{name}", config[name], "a section of keys" if is_section else "a plain value")


def build_module(config: dict):
    """The linen module that a config describes, checked against its image side."""
    from mvar_jax.checkpoints.model_directory import module_from_dict

    check_config(config)
    kind, fields = config["task"], dict(config["model"])
    try:
        module = module_from_dict(kind, fields)
    except InputError as error:  # say it in the config's words
        raise InputError(
            f"config.model.{error.field.removeprefix(kind + '.')}", error.given, error.expected
        ) from None
    if kind == "tokenizer":
        data = fill(DataOptions, "data", config["data"])
        try:
            module.check(data.image_size)
        except InputError as error:
            raise InputError(f"config.model.{error.field}", error.given, error.expected) from None
    return module


def build_settings(config: dict):
    """The loop's settings."""
    from mvar_jax.training.loop import LoopSettings

    check_config(config)
    names = [field.name for field in dataclasses.fields(LoopSettings)]
    values = OPTIONAL_KEYS | config
    return LoopSettings(**{name: values[name] for name in names})


def build_run(config: dict):
    """What both tasks share: seed, steps, batch, optimizer, mesh."""
    from mvar_jax.sharding import MESH_AXES, make_mesh
    from mvar_jax.training.optimizer import OptimizerOptions
    from mvar_jax.training.task import RunOptions

    check_keys("config.mesh", config["mesh"], MESH_AXES)
    optimizer = fill(OptimizerOptions, "optimizer", config["optimizer"])
    numbers = (config["seed"], config["num_steps"], config["batch_size"])
    parts = config.get("accumulate_steps", OPTIONAL_KEYS["accumulate_steps"])
    run = RunOptions(*numbers, optimizer, make_mesh(**config["mesh"]), parts)
    run.check()
    return run


def build_task(config: dict):
    """Return (task, modules to describe in model.json, tokenizer weights to store beside it or None)."""
    from mvar_jax.training.tokenizer_step import CodebookOptions
    from mvar_jax.training.tokenizer_task import TokenizerTask
    from mvar_jax.training.transformer_step import PhaseOptions
    from mvar_jax.training.transformer_task import TransformerTask

    module, run = build_module(config), build_run(config)
    data = fill(DataOptions, "data", config["data"])
    if config["task"] == "tokenizer":
        options = fill(CodebookOptions, "codebook", config["codebook"])
        sources = {split: data.open(split) for split in SPLITS}
        task = TokenizerTask(run, module, options, sources, data.transform(), data.loading())
        return task, {"tokenizer": module}, None

    options = fill(PhaseOptions, "phases", config["phases"])
    tokenizer, sources, transform = open_tokens(data, module)
    module = with_classes_of(module, sources["train"], data.cache or data.path or data.name or data.source)
    initial = load_initial(config["init_from"], module)
    data_parts = (sources, transform, data.loading())
    task = TransformerTask(run, module, options, tokenizer, *data_parts, initial_params=initial)
    return task, {"tokenizer": tokenizer.tokenizer, "transformer": module}, tokenizer.tokenizer_params


def open_tokens(data: DataOptions, transformer):
    """Return (tokenizer with its weights, sources by split, transform or None) of a token cache or of images.

    Raises InputError unless the config names one of the two, and they fit the tokenizer and it the transformer.
    """
    from mvar_jax.checkpoints.model_directory import fingerprint
    from mvar_jax.tokens.cache_reader import TokenCache, read_meta

    if bool(data.cache) == bool(data.tokenizer):
        both = f"cache={data.cache!r}, tokenizer={data.tokenizer!r}"
        raise InputError("config.data", both, "one of them: a token cache, or a tokenizer that encodes images")
    if data.tokenizer:
        networks = load_tokenizer(data.tokenizer)
        check_transformer_fits(transformer, networks.tokenizer)
        networks.tokenizer.check(data.image_size)
        return networks, {split: data.open(split) for split in SPLITS}, data.transform()
    networks = load_tokenizer(read_meta(data.cache)["tokenizer_path"])
    tokenizer = networks.tokenizer
    check_transformer_fits(transformer, tokenizer)
    expected = {
        "expect_fingerprint": fingerprint(tokenizer, networks.tokenizer_params),
        "expect_sides": tokenizer.sides,
        "expect_vocab_size": tokenizer.vocab_size,
        "max_memory_bytes": data.cache_memory_mib * 2**20,
    }
    return networks, {split: TokenCache(data.cache, split, **expected) for split in SPLITS}, None


def with_classes_of(transformer, source, name: str):
    """The transformer with the source's number of classes where it has 0. Raises InputError where it has another."""
    if transformer.num_classes == 0:
        return transformer.clone(num_classes=source.num_classes)
    if transformer.num_classes != source.num_classes:
        found = f"{source.num_classes}, those of {name} (0 takes them from there)"
        raise InputError("config.model.num_classes", transformer.num_classes, found)
    return transformer


def load_initial(path: str, transformer):
    """Weights to start from, of a model directory, a workdir or a published file (MVAR or VAR); None for "".

    Raises InputError naming the first parameter of another shape.
    """
    from mvar_jax.checkpoints.model_directory import check_shapes, load_model

    if not path:
        return None
    if Path(path).is_dir():
        params = load_model(Path(path))[1].get("transformer")
        if params is None:
            raise InputError("config.init_from", path, "a directory that holds a transformer")
    else:
        from mvar_jax.convert.weights import load_published

        params = load_published(path, transformer.sides)[1]
    check_shapes(Path(path), "transformer", transformer, params)
    return params


def load_tokenizer(directory: str):
    """Load the tokenizer of a model directory or a training workdir, as `Networks` without a transformer."""
    from mvar_jax.checkpoints.model_directory import load_model
    from mvar_jax.models.networks import Networks

    path = Path(directory)
    modules, params = load_model(path)
    if "tokenizer" not in modules:
        raise InputError("tokenizer", str(path), "a directory that holds a tokenizer")
    return Networks(modules["tokenizer"], params["tokenizer"])


def check_transformer_fits(transformer, tokenizer) -> None:
    """Raises InputError unless both have the same scales and codebook sizes."""
    for name in ("sides", "vocab_size", "code_width"):
        ours, theirs = getattr(transformer, name), getattr(tokenizer, name)
        if ours != theirs:
            raise InputError(f"config.model.{name}", ours, f"{theirs}, that of the tokenizer")
