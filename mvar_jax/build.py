"""From a config to modules, data and tasks. No ml_collections.ConfigDict goes below this file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError
from mvar_jax.fields import check_keys, check_values, from_dict, put_below

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
TASK_KEYS = {"tokenizer": {"codebook": True}, "transformer": _TOKEN_KEYS, "refiner": _TOKEN_KEYS}
# the same of keys that one task may leave out, a section's keys then having their defaults
TASK_OPTIONS: dict[str, dict[str, bool]] = {
    "tokenizer": {"init_from": False, "train_parts": False, "adversary": True},
    "transformer": {},
    "refiner": {},
}


def check_config(config: dict) -> None:
    """Raise InputError unless the config has every common key, its task's section and nothing else.

    The plain keys must be what their annotations say; those of a section are checked when it is built.

    Keys that no options class holds:
      task: what is trained: tokenizer, transformer or refiner.
      init_from: initial weights: a model directory, a workdir or a published file; "" for none. The model section of
        a tokenizer then gives only what differs from that model. Of a refiner: the model directory or workdir of the
        transformer that it refines.
      train_parts: of a tokenizer that starts from `init_from`: all, or decoder. The latter freezes encoder, quant
        convolution, codebook and phi, so that ids, token caches and transformers stay valid.
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
    optional = dict.fromkeys(OPTIONAL_KEYS, False) | TASK_OPTIONS[task]
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


def build_run(config: dict, devices: list | None = None):
    """Return the `RunOptions` of a config: seed, steps or epochs, batch, optimizer, and a mesh for the model.

    devices: those of the mesh; None: all that are here.
    """
    from mvar_jax.sharding import MESH_AXES, make_mesh
    from mvar_jax.training.optimizer import OptimizerOptions
    from mvar_jax.training.task import RunOptions

    check_keys(config["mesh"], MESH_AXES, "config.mesh")
    check_values(make_mesh, config["mesh"], "config.mesh")
    try:
        mesh = make_mesh(**config["mesh"], devices=devices, dimensions=build_module(config).mesh_sizes())
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
    epochs, warmup = config.get("epochs", 0), config["optimizer"].get("warmup_epochs", 0)
    if not (epochs or warmup):
        return ""
    run, num_images = task.run, len(task.data["train"])
    given = [f"{epochs:g} epochs"] * bool(epochs) + [f"{warmup:g} epochs of warm-up"] * bool(warmup)
    steps = f"{run.num_steps} steps, the first {run.optimizer.warmup_steps} of them warm-up"
    return f"{' with '.join(given)}: {num_images} images in batches of {run.batch_size} make {steps}"


def _given_fields(cls: type, config: dict) -> dict[str, Any]:
    return {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}


def with_initial_model(config: dict, workdir: Path | None = None) -> tuple[dict, Any]:
    """Return (config, initial weights of a tokenizer or None): with `init_from` its model section becomes whole.

    workdir: if a run there has a checkpoint, its own model is taken and no initial weights are needed. The returned
      config then names the weights that the run began with.
    """
    from mvar_jax.checkpoints.manager import has_checkpoint
    from mvar_jax.training.initial import load_initial_tokenizer
    from mvar_jax.training.resume_rules import config_of_run

    data, parts = build_data(config), config.get("train_parts", "all")
    path = config.get("init_from", "")
    if config["task"] != "tokenizer":
        return config, None
    if workdir is not None and has_checkpoint(workdir):
        run = config_of_run(workdir)
        path = path or run.get("init_from", "")
        own = run.get("model", {}) if path or parts != "all" else {}
        return {**config, **({"init_from": path} if path else {}), "model": own | config["model"]}, None
    if parts == "decoder" and not path:
        words = "config.train_parts=decoder needs config.init_from: a model directory, a workdir or a published file"
        raise InputError(words, field="config.init_from", given=path, expected="the weights to start from")
    if not path:
        return config, None
    fields, initial = load_initial_tokenizer(path, config["model"], data.image_size, parts)
    return {**config, "model": fields}, initial


def build_task(config: dict, initial: Any = None, resumes: bool = False):
    """Return (task, modules of model.json, weights of the frozen modules), the last two by kind.

    initial: weights of `with_initial_model`. resumes: there is a checkpoint, so a transformer needs no initial ones.
    """
    from mvar_jax.scorers import make_scorer
    from mvar_jax.tokens.opening import open_tokens
    from mvar_jax.training.codebook_options import CodebookOptions
    from mvar_jax.training.initial import load_base, load_initial
    from mvar_jax.training.refiner_task import RefinerTask
    from mvar_jax.training.task import TaskData
    from mvar_jax.training.tokenizer_task import TokenizerTask
    from mvar_jax.training.transformer_step import PhaseOptions
    from mvar_jax.training.transformer_task import TransformerTask

    data, module, run = build_data(config), build_module(config), build_run(config)
    if config["task"] == "tokenizer":
        options = from_dict(CodebookOptions, config["codebook"], "config.codebook")
        sources = data.open_all()
        task_data = TaskData(sources, data.transform(module.channels), data.loading())
        run = run.with_images(len(sources["train"]))
        of_images = len(sources.get("val", ())), module.channels
        scorer = make_scorer("tokenizer", run, data, module.image_size, *of_images)
        adversary, parts = build_adversary(config, module), config.get("train_parts", "all")
        fixed = load_fixed(options, adversary)
        task = TokenizerTask(run, module, options, task_data, scorer, adversary, fixed, initial, parts)
        return task, {"tokenizer": module}, {}

    options = from_dict(PhaseOptions, config["phases"], "config.phases")
    tokenizer, sources, transform = open_tokens(data, module)
    names = sources["train"].label_names
    try:
        run.eval_sampling.check_scales(len(tokenizer.tokenizer.sides))
    except InputError as error:
        raise put_below(error, "config.eval", "_") from None
    run = run.with_images(len(sources["train"]))
    of_images = len(sources.get("val", ())), tokenizer.tokenizer.channels
    scorer = make_scorer("transformer", run, data, tokenizer.tokenizer.image_size, *of_images)
    task_data = TaskData(sources, transform, data.loading())
    modules, frozen = {"tokenizer": tokenizer.tokenizer}, {"tokenizer": tokenizer.tokenizer_params}
    if config["task"] == "refiner":
        base = load_base(config["init_from"], module, tokenizer, names)
        modules |= {"transformer": base.transformer, "refiner": module}
        return RefinerTask(run, options, base, task_data, scorer), modules, frozen | {"transformer": base.params}
    module = with_classes_of(module, sources["train"], data.cache or data.path or data.name or data.source)
    initial = None if resumes else load_initial(config["init_from"], module, names, tokenizer)
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
