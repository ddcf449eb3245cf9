"""What the tasks of the training loop share: options of a run, state, batches and evaluation data."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.pipeline import eval_batches, train_batches
from mvar_jax.data.protocols import Source, Transform
from mvar_jax.data.skipped import Skipped
from mvar_jax.errors import InputError
from mvar_jax.models.init import initializer
from mvar_jax.models.transformer import Transformer
from mvar_jax.sharding import check_batch_size, check_sizes, put_batch, replicated, use_mesh
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import TrainState, abstract_sharded, init_sharded, make_state

NUM_PICTURES = 16


def sizes_of(module) -> dict[str, tuple[str, int]]:
    """Config key -> (logical axis, size) of the dimensions that a mesh cuts and that must divide."""
    if isinstance(module, Transformer):
        D = module.width
        named = {"width": ("width", D), "num_heads": ("heads", module.num_heads), "width * 4": ("hidden", 4 * D)}
        return {**named, "vocab_size": ("vocab", module.vocab_size)}
    widths = {f"ch * {mult}": module.ch * mult for mult in module.ch_mult}
    named = {f"{key} (in)": ("channels_in", size) for key, size in widths.items()}
    named |= {f"{key} (out)": ("channels_out", size) for key, size in widths.items()}
    return {**named, "vocab_size": ("vocab", module.vocab_size)}


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What both tasks share."""

    seed: int
    num_steps: int
    batch_size: int
    optimizer: OptimizerOptions
    mesh: Mesh
    accumulate_steps: int = 1  # parts of a batch whose gradients are added up

    def check(self) -> None:
        """Raises InputError for values out of range."""
        if self.accumulate_steps < 1:
            raise InputError("accumulate_steps", self.accumulate_steps, "1 or more parts of a batch")
        check_batch_size(self.batch_size, self.mesh, self.accumulate_steps)
        self.optimizer.check(self.num_steps)

    def rates(self, step: int) -> tuple[np.float32, np.float32]:
        """(learning rate, weight decay) of a step."""
        learning_rate, weight_decay = self.optimizer.at(step, self.num_steps, self.batch_size)
        return np.float32(learning_rate), np.float32(weight_decay)


class Task:
    """State, batches and evaluation data: the part that does not depend on what is trained."""

    def __init__(self, run: RunOptions, module, data: dict[str, Source], transform: Transform | None, loading, extra):
        run.check()
        check_sizes(sizes_of(module), run.mesh)
        self.run, self.module, self.data, self.transform = run, module, data, transform
        self.loading: LoadOptions = loading
        # by split, what this process found bad
        self.skipped = {split: Skipped(split, len(source), loading.max_bad_share) for split, source in data.items()}
        self.examples_per_step = run.batch_size
        # rbg: compiling many threefry draws takes most of a small model's start-up
        init = functools.partial(initializer(module), jax.random.key(run.seed, impl="rbg"))
        self._make_state = functools.partial(make_state, init, run.optimizer, extra)
        self.initial_params = None
        # outputs are placed as the state is: left to itself the compiler may place them otherwise
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        self._whole = replicated(run.mesh)

    def init_state(self) -> TrainState:
        """Sharded arrays, a function of the seed, or of the weights that fine-tuning starts from."""
        with use_mesh(self.run.mesh):
            state, abstract = init_sharded(self._make_state, self.run.mesh)
        if self.initial_params is None:
            return state
        place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding)
        params = jax.tree.map(place, self.initial_params, abstract.params)
        # the average has a buffer of its own: a step donates both
        ema = None if state.ema is None else jax.tree.map(place, self.initial_params, abstract.params)
        return state.replace(params=params, ema=ema)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state."""
        return abstract_sharded(self._make_state, self.run.mesh)

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches from `start_step` on."""
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
        """The validation split, every sample once; padding rows have mask 0."""
        batches = eval_batches(
            self.data["val"],
            self.transform,
            batch_size=self.run.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            options=self.loading,
            skipped=self.skipped["val"],
        )
        for batch in batches:
            batch.pop("index", None)
            yield put_batch(batch, self.run.mesh)

    def averaged(self, state: TrainState):
        """The weights to evaluate: the moving average where one is kept."""
        return state.params if state.ema is None else state.ema

    def weights_at_hand(self, state: TrainState):
        """`averaged` as arrays that this process may use alone; of several processes all must call this."""
        params = self.averaged(state)
        return params if jax.process_count() == 1 else multihost_utils.process_allgather(params, tiled=True)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Batch arrays on the mesh; sample numbers as uint32, which random keys take."""
        return put_batch({**batch, "index": batch["index"].astype(np.uint32)}, self.run.mesh)
