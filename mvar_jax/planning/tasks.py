"""The task of a config without its data and weights: shapes on the mesh of a target."""

import flax.linen as nn
import jax
import numpy as np

from mvar_jax import build
from mvar_jax.checkpoints.model_directory import module_from_dict, read_model_file
from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError
from mvar_jax.fields import from_dict, put_below
from mvar_jax.files.paths import as_path
from mvar_jax.hardware.compiling import Compiled, compile_jitted
from mvar_jax.models.dino import shapes as dino_shapes
from mvar_jax.models.init import abstract_params
from mvar_jax.models.lpips import shapes as lpips_shapes
from mvar_jax.models.networks import Networks, check_fit
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.scales import KNOWN_SIDES
from mvar_jax.sharding import batch_like, make_mesh, num_shards_of, place, replicated, use_mesh
from mvar_jax.tokens.cache_reader import TOKENIZER_FOLDER
from mvar_jax.tokens.encode import encode_pixels
from mvar_jax.training.adversary import DINO, FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.programs import CACHE, Program
from mvar_jax.training.refiner_task import RefinerTask
from mvar_jax.training.task import DataTask, RunOptions, TaskData
from mvar_jax.training.tokenizer_task import TokenizerTask
from mvar_jax.training.transformer_step import PhaseOptions
from mvar_jax.training.transformer_task import TransformerTask

NUM_IMAGES = {"imagenet2012": 1_281_167}  # of the training split, by config.data.name
HEAD_WIDTH = 64  # of the published transformers, whose width is 64 * depth
NUM_ENCODED = 64  # images that a process of `cache_tokens` encodes at once, by default


def make_task(config: dict, devices: tuple, num_images: int | None = None, tokenizer: Tokenizer | None = None):
    """Return the task that `train` would run on these devices, without data and weights.

    Args:
      config: of a run.
      devices: of the target.
      num_images: of the training split, which turns epochs into steps; None takes what is known of the data.
      tokenizer: of a transformer's or refiner's run; None takes that of the config's data if it is there, else the
        published one.

    Raises InputError if the config is no config, its mesh, batch and sizes do not fit, or epochs need `num_images`.
    """
    data, config = build.build_data(config), with_sides(config)
    module = build.build_module(config)
    run = with_steps(build.build_run(config, list(devices)), data, num_images)
    of_images = TaskData({}, data.transform(getattr(module, "channels", 3)), data.loading())
    if config["task"] == "tokenizer":
        options = from_dict(CodebookOptions, config["codebook"], "config.codebook")
        adversary = build.build_adversary(config, module)
        fixed = FixedWeights(lpips_shapes() if options.perceptual_weight else None)
        if adversary is not None and adversary.options.kind == DINO:
            fixed = fixed.replace(discriminator={"vit": dino_shapes()})
        train_parts = config.get("train_parts", "all")
        return TokenizerTask(run, module, options, of_images, None, adversary, fixed, train_parts=train_parts)
    options = from_dict(PhaseOptions, config["phases"], "config.phases")
    tokenizer = tokenizer or tokenizer_of(config, data)
    networks = Networks(tokenizer, params_like(tokenizer)).with_precision(module.precision)
    check_tokenizer(networks.tokenizer, module, data)
    of_tokens = TaskData({}, None, data.loading()) if data.cache or not data.tokenizer else of_images
    if config["task"] == "refiner":
        base = published_transformer(module)
        networks = networks.replace(transformer=base, params=params_like(base), refiner=module)
        return RefinerTask(run, options, networks, of_tokens)
    if module.num_classes == 0:
        words = (
            "config.model.num_classes must be given to plan without data, got 0; pass --config.model.num_classes=N"
        )
        raise InputError(words, field="config.model.num_classes", given=0, expected="the number of classes")
    return TransformerTask(run, module, options, networks, of_tokens)


def with_sides(config: dict) -> dict:
    """Return the config; a tokenizer's that starts from other weights may leave its sides to them."""
    sides = KNOWN_SIDES.get(config["data"]["image_size"])
    if config["task"] != "tokenizer" or not config.get("init_from") or "sides" in config["model"] or sides is None:
        return config
    return config | {"model": {"sides": sides} | config["model"]}


def with_steps(run: RunOptions, data: DataOptions, num_images: int | None) -> RunOptions:
    """Return the options of a run with epochs turned into steps. Raises InputError if that needs `num_images`."""
    num_images = num_images or data.size or NUM_IMAGES.get(data.name)
    if num_images is None and (run.epochs or run.optimizer.warmup_epochs):
        words = "--images must be given, the number of training images, since the config counts in epochs"
        raise InputError(words, field="images", given=None, expected="the number of training images")
    return run.with_images(num_images or run.batch_size)


def params_like(module: nn.Module):
    """Return a module's parameters as shapes."""
    return nn.meta.unbox(abstract_params(module))


def tokenizer_of(config: dict, data: DataOptions) -> Tokenizer:
    """Return the tokenizer that the config's data name, if it is there, else the published one of its sizes."""
    folder = as_path(data.tokenizer, "config.data.tokenizer") if data.tokenizer else None
    if folder is None and data.cache:
        folder = as_path(data.cache, "config.data.cache") / TOKENIZER_FOLDER
    if folder is not None and folder.exists():
        return module_from_dict("tokenizer", read_model_file(folder)["tokenizer"])
    model = config["model"]
    sizes = {name: model[name] for name in ("sides", "vocab_size", "code_width", "dtype") if name in model}
    return module_from_dict("tokenizer", sizes)


def check_tokenizer(tokenizer: Tokenizer, module: nn.Module, data: DataOptions) -> None:
    """Raise InputError unless a tokenizer fits the module and the images."""
    try:
        check_fit(tokenizer, module)
        tokenizer.check(data.image_size)
    except InputError as error:
        words = f"{error}; pass --tokenizer with the config of the tokenizer, such as digits_tokenizer"
        raise put_below(InputError(words, field=error.field, given=error.given), "tokenizer") from None


def published_transformer(refiner) -> Transformer:
    """Return the published transformer of a refiner's width: what it refines."""
    sizes = {name: getattr(refiner, name) for name in ("sides", "vocab_size", "code_width", "width", "dtype")}
    num_blocks = max(1, refiner.width // HEAD_WIDTH)
    more = {"depth": num_blocks, "num_heads": num_blocks, "num_classes": 1000, "refine_step": len(refiner.sides) - 2}
    return Transformer(**sizes, **more, kernel_size=7)


def programs_of(task: DataTask, num_samples: int, num_encoded: int = NUM_ENCODED) -> list[Program]:
    """Return the programs of a run, then those of `cache_tokens`.

    Args:
      task: of `make_task`.
      num_samples: images that the sampler draws at once, over all devices; rounded up to what the mesh divides.
      num_encoded: images that a process of `cache_tokens` encodes at once.
    """
    mesh = task.run.mesh
    up = lambda number, divisor: -(-number // divisor) * divisor
    found = task.programs(up(num_samples, num_shards_of("batch", mesh)))
    devices = list(mesh.devices.flat)
    num = up(num_encoded * len({device.process_index for device in devices}), len(devices))
    tokenizer = task.module if isinstance(task, TokenizerTask) else task.tokenizer.tokenizer
    spread = make_mesh(devices=devices)  # as `Encoder`, which has those of one process alone
    networks = Networks(tokenizer, place(params_like(tokenizer), replicated(spread)))
    images = batch_like(spread, image=((num, *[tokenizer.image_size] * 2, tokenizer.channels), "uint8"))
    return [*found, Program(CACHE, f"cache tokens of {num}", encode_pixels, (networks, images["image"]), 0, num)]


def compile_program(task: DataTask, program: Program, target: str) -> Compiled:
    """Compile a program of a task for the target of the task. Raises OutOfMemory if it is too large."""
    with use_mesh(task.run.mesh):
        return compile_jitted(target, program.jitted, *program.arguments)


def bytes_on_device(tree) -> int:
    """Return the bytes that one device holds of a tree's shapes with shardings; other leaves take none."""
    shapes = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]
    return int(sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes))
