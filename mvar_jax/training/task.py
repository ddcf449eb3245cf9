"""What the tasks share: options of a run, state, batches and evaluation data."""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.pipeline import eval_batches, train_batches
from mvar_jax.data.protocols import Source, Transform
from mvar_jax.data.skipped import Skipped
from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields, put_below
from mvar_jax.models.init import abstract_params
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.schema import Count, Natural, NotNegative, Seed
from mvar_jax.sharding import (
    check_batch_size,
    check_sizes,
    constrain,
    num_shards_of,
    put_batch,
    replicated,
    use_mesh,
    whole_dimensions,
)
from mvar_jax.training.initial import CLASS_TABLE, Initial
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.programs import Program
from mvar_jax.training.protocol import Task
from mvar_jax.training.saving import say
from mvar_jax.training.scoring import IMAGES_PER_SHARD, Scored, Scorer, score_together
from mvar_jax.training.state import TrainState, abstract_sharded, init_sharded, make_state

NUM_PICTURES = 16


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options that all tasks share.

    Attributes:
      seed: seed of the initial weights, the order of samples, augmentation and dropout.
      num_steps: optimizer steps of the whole run; 0, or no such key, if epochs is given.
      batch_size: images of an optimizer step, over all devices and processes.
      optimizer: options of AdamW.
      mesh: devices by axis.
      accumulate_steps: equal parts of a batch whose gradients are added up, to save memory.
      epochs: passes over the training images, instead of num_steps; the last batch of each is filled up.
      eval_samples: images that each evaluation draws, from fixed seeds and balanced over the classes, and scores: of
        digits by the quickstart's judge (fd_N, judge_accuracy), else fid_N and inception_score_N. Of a tokenizer,
        validation images that it reconstructs (rfid_N). N is 1k for 1000. 0 scores none.
      eval_inception: weights for FID, as `convert --inception` writes them.
      eval_reference: .npz that samples are compared with, with `mu` and `sigma` or with images as `arr_0`.
      eval_cfg: guidance of the scored samples.
      eval_top_k: of them; keeps the k most likely codes, 0 all.
      eval_top_p: of them; keeps the most likely codes of mass p, 0 all.
      eval_temperature: of them; one number, or one for each scale.

    Raises InputError for values out of range.
    """

    seed: Seed
    num_steps: Natural
    batch_size: int
    optimizer: OptimizerOptions
    mesh: Mesh = dataclasses.field(metadata=FREE)
    accumulate_steps: Count = dataclasses.field(default=1, metadata=FREE)
    epochs: NotNegative = dataclasses.field(default=0.0, metadata=FREE)  # a run is compared by its steps
    eval_samples: Natural = dataclasses.field(default=0, metadata=FREE)
    eval_inception: str = dataclasses.field(default="", metadata=FREE)
    eval_reference: str = dataclasses.field(default="", metadata=FREE)
    eval_cfg: float = dataclasses.field(default=1.5, metadata=FREE)
    eval_top_k: int = dataclasses.field(default=0, metadata=FREE)
    eval_top_p: float = dataclasses.field(default=0.0, metadata=FREE)
    eval_temperature: float | tuple[float, ...] = dataclasses.field(default=1.0, metadata=FREE)

    def __post_init__(self):
        check_fields(self, "config")
        try:
            check_batch_size(self.batch_size, self.mesh, self.accumulate_steps)
        except InputError as error:
            raise put_below(error, "config") from None
        try:
            _ = self.eval_sampling
        except InputError as error:
            raise put_below(error, "config.eval", "_") from None
        for name in ("eval_inception", "eval_reference"):
            if (given := getattr(self, name)) and not self.eval_samples:
                words = (
                    f"config.{name} must be '' if config.eval_samples is 0, which scores no images, got {given!r}; "
                )
                raise InputError(f"{words}give eval_samples too", field=f"config.{name}", given=given, expected="''")
        if self.eval_samples == 1:
            words = "config.eval_samples must be 0 (none) or at least 2, got 1: a covariance needs two images"
            raise InputError(words, field="config.eval_samples", given=1, expected="0 or at least 2")
        if (self.num_steps > 0) == (self.epochs > 0):
            both = f"{self.num_steps} and {self.epochs}"
            words = f"exactly one of config.num_steps and config.epochs must be above 0, got {both}"
            raise InputError(
                f"{words}; set the other to 0", field="config.num_steps", given=both, expected="one above 0"
            )
        # of different units they are compared by `with_images`
        for warmup_name, end_name in (("warmup_steps", "num_steps"), ("warmup_epochs", "epochs")):
            warmup, end = getattr(self.optimizer, warmup_name), getattr(self, end_name)
            if end and warmup >= end:
                field = f"config.optimizer.{warmup_name}"
                words = f"{field} must be below config.{end_name}={end}, got {warmup}"
                raise InputError(words, field=field, given=warmup, expected=f"0 to below {end}")

    @property
    def eval_sampling(self) -> SampleOptions:
        """Return how the samples that are scored are drawn."""
        return SampleOptions(self.eval_cfg, self.eval_top_k, self.eval_top_p, temperature=self.eval_temperature)

    def with_images(self, num_images: int) -> "RunOptions":
        """Return the options with epochs turned into steps. num_images: of the training split."""
        steps_per_epoch = -(-num_images // self.batch_size)
        num_steps = self.num_steps or max(1, round(self.epochs * steps_per_epoch))
        optimizer = self.optimizer.with_steps(steps_per_epoch)
        if (given := self.optimizer.warmup_epochs) and optimizer.warmup_steps >= num_steps:
            field, expected = "config.optimizer.warmup_epochs", f"below {num_steps / steps_per_epoch:g}"
            words = f"{field} must be {expected}, the epochs of {num_steps} steps of {self.batch_size} images, "
            raise InputError(f"{words}got {given:g}", field=field, given=given, expected=expected)
        return dataclasses.replace(self, num_steps=num_steps, epochs=0.0, optimizer=optimizer)

    def rates(self, step: int) -> tuple[np.float32, np.float32]:
        """Return (learning rate, weight decay) of a step."""
        learning_rate, weight_decay = self.optimizer.at(step, self.num_steps, self.batch_size)
        return np.float32(learning_rate), np.float32(weight_decay)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of a task: sources by split (maybe no "val"), their transform, and how batches are loaded."""

    sources: dict[str, Source]
    transform: Transform | None
    loading: LoadOptions


class DataTask(Task):
    """A task's state, batches and evaluation data: the part that does not depend on what is trained.

    Args:
      run: options of the run.
      module: a linen module with `init_params` and `mesh_sizes`.
      data: the data.
      extra: makes what a step keeps in the state beside the weights, boxed with logical axes. Called under jit.
      scorer: of the images that an evaluation draws; None draws none.
      trained: see `make_state`.
    """

    def __init__(
        self,
        run: RunOptions,
        module: nn.Module,
        data: TaskData,
        extra: Callable[[], dict[str, Any]],
        scorer: Scorer | None = None,
        trained: Callable[[dict], dict] = lambda params: params,
    ):
        check_sizes(module.mesh_sizes(), run.mesh)
        self.run, self.module = run, module
        self.data, self.transform, self.loading = data.sources, data.transform, data.loading
        # split -> bad samples found by this process
        share = data.loading.max_bad_share
        self.has_evaluation = "val" in data.sources or scorer is not None
        self.scorer = scorer
        if scorer is not None:
            self.metrics = (*(self.metrics if "val" in data.sources else ()), *scorer.names)
        self.data_identity = {split: source.identity() for split, source in data.sources.items()}
        self.skipped = {split: Skipped(split, len(source), share) for split, source in data.sources.items()}
        self.examples_per_step = run.batch_size
        # rbg: compiling many threefry draws takes most of a small model's start
        init = functools.partial(self._init_params, jax.random.key(run.seed, impl="rbg"))
        self._make_state = lambda: make_state(init, run.optimizer, extra(), trained)
        self.initial: Initial | None = None
        self.base: str | None = None  # fingerprint of the transformer that a refiner refines
        # outputs are placed as the state: left to itself the compiler may place them differently
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        self._whole = replicated(run.mesh)

    def _init_params(self, key: jax.Array):
        """Return the tree of initial parameters, boxed with their logical axes."""
        return self.module.init_params(key)

    def init_state(self) -> TrainState:
        """Return sharded arrays, a function of the seed or of the weights that fine-tuning starts from."""
        with use_mesh(self.run.mesh):
            state, abstract = init_sharded(self._make_state, self.run.mesh)
        if self.initial is None:
            return state
        if self.initial.note:
            say(self.initial.note)
        # the average has buffers of its own: a step donates both
        ema = None if state.ema is None else self._start_params(state.ema, abstract.params)
        return state.replace(params=self._start_params(state.params, abstract.params), ema=ema)

    def _start_params(self, own: dict, abstract_params: dict):
        """Return the run's own weights, replaced by the given ones except in fresh class rows."""
        initial = self.initial
        assert initial is not None
        place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding)
        given = jax.tree.map(place, initial.params, {name: abstract_params[name] for name in initial.params})
        params = {**own, **given}
        if initial.fresh_rows is not None:
            is_fresh_C1 = jax.device_put(initial.fresh_rows[:, None], self._whole)
            pick = jax.jit(jnp.where, out_shardings=abstract_params[CLASS_TABLE].sharding)
            params[CLASS_TABLE] = pick(is_fresh_C1, own[CLASS_TABLE], params[CLASS_TABLE])
        return params

    def abstract_state(self) -> TrainState:
        """Return shapes and shardings of the state."""
        return abstract_sharded(self._make_state, self.run.mesh)

    def whole_dimensions(self) -> list[str]:
        """Return the dimensions of parameters that stay whole since the mesh does not divide them."""
        return whole_dimensions(abstract_params(self.module), self.run.mesh)

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield this process's rows of the batches from `start_step` on."""
        return train_batches(
            self.data["train"],
            self.transform,
            batch_size=self.run.batch_size,
            seed=self.run.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            options=self.loading,
            skipped=self.skipped["train"],
        )

    def eval_batches(self) -> Iterator[dict[str, jax.Array]]:
        """Yield the validation split, every sample once, in batches of a training step's part; padding has mask 0."""
        batches = eval_batches(
            self.data["val"],
            self.transform,
            batch_size=self.run.batch_size // self.run.accumulate_steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            options=self.loading,
            skipped=self.skipped["val"],
        )
        for batch in batches:
            batch.pop("index", None)
            yield put_batch(batch, self.run.mesh)

    def scores(self, batches: Scored) -> dict[str, float]:
        """Return the scores of images that are drawn for them, see `Scorer.score`; nothing without a scorer."""
        return {} if self.scorer is None else score_together(self.scorer, batches)

    def settings_of(self, metric: str) -> dict[str, Any]:
        """Return how images are drawn and compared, if the metric is a score of them."""
        if self.scorer is None or metric not in self.scorer.names:
            return {}
        names = [field.name for field in dataclasses.fields(self.run) if field.name.startswith("eval_")]
        settings = {name: getattr(self.run, name) for name in names if name != "eval_inception"}
        return settings | {"eval_reference": os.path.basename(self.run.eval_reference)}  # it may lie elsewhere now

    @property
    def eval_rows(self) -> int:
        """Return the number of images that are drawn at once for their scores, a multiple of the mesh's shards."""
        num_shards = num_shards_of("batch", self.run.mesh)
        return num_shards * min(IMAGES_PER_SHARD, -(-self.run.eval_samples // num_shards))

    def averaged(self, state: TrainState):
        """Return the weights to evaluate: the moving average, if one is kept."""
        return state.params if state.ema is None else state.ema

    def picture_rows(self, num: int = NUM_PICTURES) -> jax.Array:
        """Return the numbers of the pictures, the last one repeated until they divide over the devices of a batch."""
        num_shards = num_shards_of("batch", self.run.mesh)
        rows = jnp.minimum(jnp.arange(-(-num // num_shards) * num_shards), num - 1)
        return constrain(rows, "batch")

    @abc.abstractmethod
    def programs(self, num_samples: int) -> list[Program]:
        """Return the programs of a run, its steps first. num_samples: that the sampler draws at once."""

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return the batch on the mesh, with sample numbers as uint32 for random keys."""
        return put_batch({**batch, "index": batch["index"].astype(np.uint32)}, self.run.mesh)
