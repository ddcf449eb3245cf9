"""From a config to modules, data and tasks. No ml_collections.ConfigDict goes below this file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError
from mvar_jax.fields import check_keys, check_values, from_dict, put_below
from mvar_jax.files.paths import as_path

# key -> whether it is a section; every config has exactly these
COMMON_KEYS = {
    "task": False,
    "seed": False,
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
# keys that a config may leave out: their defaults are those of RunOptions and LoopSettings; one of the first two is
# needed
OPTIONAL_KEYS = (
    "num_steps",
    "epochs",
    "accumulate_steps",
    "keep_best",
    "profile_steps",
    "eval_samples",
    "eval_inception",
    "eval_reference",
    "eval_cfg",
    "eval_top_k",
    "eval_top_p",
    "eval_temperature",
)
_TOKEN_KEYS = {"phases": True, "init_from": False}
# sections that a config may leave out, each key then having its default
OPTIONAL_SECTIONS = {"tokenizer": ("adversary",), "transformer": (), "refiner": ()}
TASK_KEYS = {"tokenizer": {"codebook": True}, "transformer": _TOKEN_KEYS, "refiner": _TOKEN_KEYS}


def check_config(config: dict) -> None:
    """Raise InputError unless the config has every common key, its task's section and nothing else.

    The plain keys must be what their annotations say; those of a section are checked when it is built.

    Keys that no options class holds:
      task: what is trained: tokenizer, transformer or refiner.
      init_from: initial weights of the transformer: a model directory, a workdir or a published file; "" for none. Of
        a refiner: the model directory or workdir of the transformer that it refines.
    """
    task = config.get("task")
    if task not in TASK_KEYS:
        expected = " or ".join(TASK_KEYS)
        raise InputError(
            f"config.task must be {expected}, got {task!r}", field="config.task", given=task, expected=expected
        )
    from mvar_jax.training.settings import LoopSettings
    from mvar_jax.training.task import RunOptions

    known = COMMON_KEYS | TASK_KEYS[task]
    optional = dict.fromkeys(OPTIONAL_KEYS, False) | dict.fromkeys(OPTIONAL_SECTIONS[task], True)
    check_keys(config, (*known, *optional), "config")
    for name, is_section in (known | optional).items():
        field = f"config.{name}"
        if name not in config:
            if name in optional:
                continue
            raise InputError(f"{field} is missing; every config of a {task} has it", field=field)
        if is_section != isinstance(config[name], dict):
            expected = "a section of keys" if is_section else "a plain value"
            words = f"{field} must be {expected}, got {config[name]!r}"
            raise InputError(words, field=field, given=config[name], expected=expected)
    plain = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for cls in (RunOptions, LoopSettings):
        check_values(cls, plain, "config")
    if not isinstance(path := config.get("init_from", ""), str):
        words = f"config.init_from must be text, got {path!r}"
        raise InputError(words, field="config.init_from", given=path, expected="text")


def build_data(config: dict) -> DataOptions:
    """Return the options of the config's data."""
    check_config(config)
    return from_dict(DataOptions, config["data"], "config.data")


def with_class_order(config: dict, kept: Sequence[str]) -> dict:
    """Return the config of a run or a token cache that began with the same class folders in another order.

    Version 0.1 sorted folders that are called by numbers as text: 0, 1, 10, 2. kept: the classes in the order of
    their labels.
    """
    from mvar_jax.data.folder import list_classes

    data = build_data(config)
    if not kept or data.source != "folder" or not data.path or data.cache or data.class_order:
        return config
    found = list_classes(data.path)
    if tuple(kept) == found or sorted(kept) != sorted(found):
        return config
    return {**config, "data": {**config["data"], "class_order": tuple(kept)}}


def build_module(config: dict):
    """Return the linen module that a config describes. Raises InputError if it does not fit the images."""
    from mvar_jax.checkpoints.model_directory import module_from_dict

    data, kind = build_data(config), config["task"]
    module = module_from_dict(kind, config["model"], "config.model")
    if kind == "tokenizer":
        try:
            module.check(data.image_size)
        except InputError as error:
            raise put_below(error, "config.model") from None
    return module


def build_settings(config: dict):
    """Return the `LoopSettings` of a config; num_steps is 0 if it follows from epochs."""
    from mvar_jax.training.settings import LoopSettings

    check_config(config)
    return LoopSettings(**_given_fields(LoopSettings, {"num_steps": 0} | config))


def build_run(config: dict):
    """Return the `RunOptions` of a config: seed, steps or epochs, batch, optimizer, and a mesh for the model."""
    from mvar_jax.sharding import MESH_AXES, make_mesh
    from mvar_jax.training.optimizer import OptimizerOptions
    from mvar_jax.training.task import RunOptions

    check_keys(config["mesh"], MESH_AXES, "config.mesh")
    check_values(make_mesh, config["mesh"], "config.mesh")
    try:
        mesh = make_mesh(**config["mesh"], dimensions=build_module(config).mesh_sizes())
    except InputError as error:
        raise put_below(error, "config") from None
    sections = {"optimizer": from_dict(OptimizerOptions, config["optimizer"], "config.optimizer"), "mesh": mesh}
    return RunOptions(**_given_fields(RunOptions, {"num_steps": 0} | config | sections))


def with_steps(config: dict, run) -> dict:
    """Return the config with the steps of a task's `RunOptions`, in which epochs have become steps."""
    return {
        **config,
        "num_steps": run.num_steps,
        "optimizer": {**config["optimizer"], "warmup_steps": run.optimizer.warmup_steps},
    }


def describe_epochs(config: dict, task) -> str:
    """Return the steps that follow from the config's epochs, as a line; "" if it is given in steps."""
    epochs, warmup = config.get("epochs"), config["optimizer"].get("warmup_epochs")
    if not (epochs or warmup):
        return ""
    run, num_images = task.run, len(task.data["train"])
    given = [f"{epochs:g} epochs"] * bool(epochs) + [f"{warmup:g} epochs of warm-up"] * bool(warmup)
    steps = f"{run.num_steps} steps, the first {run.optimizer.warmup_steps} of them warm-up"
    return f"{' with '.join(given)}: {num_images} images in batches of {run.batch_size} make {steps}"


def _given_fields(cls: type, config: dict) -> dict[str, Any]:
    return {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}


def build_task(config: dict):
    """Return (task, modules of model.json, weights of the frozen modules), the last two by kind."""
    from mvar_jax.scorers import make_scorer
    from mvar_jax.training.initial import load_base, load_initial
    from mvar_jax.training.refiner_task import RefinerTask
    from mvar_jax.training.task import TaskData
    from mvar_jax.training.tokenizer_step import CodebookOptions
    from mvar_jax.training.tokenizer_task import TokenizerTask
    from mvar_jax.training.transformer_step import PhaseOptions
    from mvar_jax.training.transformer_task import TransformerTask

    data, module, run = build_data(config), build_module(config), build_run(config)
    if config["task"] == "tokenizer":
        options = from_dict(CodebookOptions, config["codebook"], "config.codebook")
        sources = data.open_all()
        task_data = TaskData(sources, data.transform(), data.loading())
        run = run.with_images(len(sources["train"]))
        scorer = make_scorer("tokenizer", run, data, module.image_size, len(sources.get("val", ())))
        adversary = build_adversary(config, module)
        fixed = load_fixed(options, adversary)
        return TokenizerTask(run, module, options, task_data, scorer, adversary, fixed), {"tokenizer": module}, {}

    options = from_dict(PhaseOptions, config["phases"], "config.phases")
    tokenizer, sources, transform = open_tokens(data, module)
    names = sources["train"].label_names
    try:
        run.eval_sampling.check_scales(len(tokenizer.tokenizer.sides))
    except InputError as error:
        raise put_below(error, "config.eval", "_") from None
    run = run.with_images(len(sources["train"]))
    scorer = make_scorer("transformer", run, data, tokenizer.tokenizer.image_size, len(sources.get("val", ())))
    task_data = TaskData(sources, transform, data.loading())
    modules, frozen = {"tokenizer": tokenizer.tokenizer}, {"tokenizer": tokenizer.tokenizer_params}
    if config["task"] == "refiner":
        base = load_base(config["init_from"], module, tokenizer, names)
        modules |= {"transformer": base.transformer, "refiner": module}
        return RefinerTask(run, options, base, task_data, scorer), modules, frozen | {"transformer": base.params}
    module = with_classes_of(module, sources["train"], data.cache or data.path or data.name or data.source)
    initial = load_initial(config["init_from"], module, names)
    task = TransformerTask(run, module, options, tokenizer, task_data, initial, scorer)
    return task, modules | {"transformer": module}, frozen


def build_adversary(config: dict, tokenizer):
    """Return the `Adversary` of a tokenizer's config, None if it has none. It computes in the tokenizer's dtype."""
    from mvar_jax.models.dino import DinoDiscriminator
    from mvar_jax.models.discriminator import PatchDiscriminator
    from mvar_jax.training.adversary import DINO, NONE, Adversary, AdversaryOptions

    options = from_dict(AdversaryOptions, config.get("adversary", {}), "config.adversary")
    if options.kind == NONE:
        return None
    if options.kind == DINO:
        return Adversary(options, DinoDiscriminator(tokenizer.dtype))
    return Adversary(options, PatchDiscriminator(options.layers, options.width, tokenizer.dtype))


def load_fixed(options, adversary):
    """Return the `FixedWeights` that a tokenizer's losses need.

    options: its `CodebookOptions`. adversary: its `Adversary` or None.
    Raises InputError if a file is missing or is another one.
    """
    from mvar_jax.evaluation.dino_weights import load_dino
    from mvar_jax.evaluation.lpips import load_lpips
    from mvar_jax.training.adversary import DINO, FixedWeights

    fixed = FixedWeights()
    if options.perceptual_weight:
        path, field = options.perceptual_file, "config.codebook.perceptual_file"
        fixed = fixed.replace(perceptual=load_lpips(path, field).params)
    if adversary is not None and adversary.options.kind == DINO:
        vit = load_dino(adversary.options.file, "config.adversary.file").params
        fixed = fixed.replace(discriminator={"vit": vit})
    return fixed


def open_tokens(data: DataOptions, transformer: Any):
    """Return (tokenizer with its weights, sources by split, transform or None) of a token cache or of images.

    The tokenizer computes in the precision of `transformer`, which may be a refiner.
    Raises InputError if the config names neither, or unless tokenizer, transformer and data fit together.
    """
    from mvar_jax.tokens.cache_reader import TokenCache, read_meta

    if not (data.cache or data.tokenizer):
        raise InputError(
            "config.data must name a token cache or a tokenizer that encodes images, got cache='' and tokenizer=''",
            field="config.data",
            given="cache='' and tokenizer=''",
            expected="cache or tokenizer",
        )
    if not data.cache:
        networks = load_tokenizer(data.tokenizer).with_precision(transformer.precision)
        check_transformer_fits(transformer, networks.tokenizer)
        networks.tokenizer.check(data.image_size)
        return networks, data.open_all(), data.transform()
    networks = load_tokenizer_of_cache(data).with_precision(transformer.precision)
    check_transformer_fits(transformer, networks.tokenizer)
    expected = {
        "expect_sides": networks.tokenizer.sides,
        "expect_vocab_size": networks.tokenizer.vocab_size,
        "max_memory_bytes": data.cache_memory_mib * 2**20,
        "disk_folder": data.cache_folder or None,
        "max_disk_bytes": data.cache_disk_mib * 2**20,
    }
    splits = ("train", "val") if "val" in read_meta(data.cache)["splits"] else ("train",)
    return networks, {split: TokenCache(data.cache, split, **expected) for split in splits}, None


def load_tokenizer_of_cache(data: DataOptions):
    """Load the tokenizer that made a cache: `data.tokenizer` if given, else the cache's own.

    An older cache has none and names a path instead. Raises InputError if the tokenizer cannot be read or did not
    make the cache.
    """
    from mvar_jax.checkpoints.model_directory import fingerprint
    from mvar_jax.tokens.cache_reader import read_meta

    meta = read_meta(data.cache)
    inside = meta.get("tokenizer")
    path = data.tokenizer or (
        str(as_path(data.cache, "config.data.cache") / inside) if inside else meta["tokenizer_path"]
    )
    advice = "pass config.data.tokenizer=DIR with the tokenizer that made it, or encode again with cache_tokens"
    try:
        networks = load_tokenizer(path)
    except InputError as error:
        if data.tokenizer:
            raise
        words = f"the tokenizer of token cache {data.cache} cannot be read: {error}; {advice}"
        raise InputError(
            words, field="config.data.cache", given=data.cache, expected="a readable tokenizer"
        ) from None
    found, expected = fingerprint(networks.tokenizer, networks.tokenizer_params), meta["tokenizer_fingerprint"]
    if found == expected:
        return networks
    if data.tokenizer:
        what = f"config.data.tokenizer={path} is not the tokenizer that made token cache {data.cache}"
    elif inside:
        what = f"token cache {data.cache} holds another tokenizer than the one that made it"
    else:
        what = f"the tokenizer {path} has changed since it made token cache {data.cache}, perhaps by more training"
    words = f"{what}: its fingerprint is {found}, not {expected}; {advice}"
    field = "config.data.tokenizer" if data.tokenizer else "config.data.cache"
    raise InputError(words, field=field, given=found, expected=expected)


def with_classes_of(transformer, source, name: str):
    """Return the transformer with the number of classes of its data, if it has 0 classes.

    Raises InputError if it has another number. name: what the error calls the data.
    """
    given, expected = transformer.num_classes, source.num_classes
    if given == 0:
        return transformer.clone(num_classes=expected)
    if given != expected:
        raise InputError(
            f"config.model.num_classes must be {expected}, the number of classes of {name}, got {given}; "
            "0 takes the number from the data",
            field="config.model.num_classes",
            given=given,
            expected=str(expected),
        )
    return transformer


def load_tokenizer(directory: str):
    """Load the tokenizer of a model directory or a workdir, as `Networks` without a transformer."""
    from mvar_jax.checkpoints.model_directory import load_model
    from mvar_jax.models.networks import Networks

    path = as_path(directory, "tokenizer")
    modules, params = load_model(path)
    if "tokenizer" not in modules:
        words = f"{path} holds no tokenizer"
        raise InputError(words, field="tokenizer", given=str(path), expected="a directory with a tokenizer")
    return Networks(modules["tokenizer"], params["tokenizer"])


def check_transformer_fits(transformer, tokenizer) -> None:
    """Raise InputError unless both have the same scales and codebook sizes."""
    from mvar_jax.models.networks import check_fit

    try:
        check_fit(tokenizer, transformer)
    except InputError as error:
        raise put_below(error, "config.model") from None
