"""The two tasks of the training loop: a tokenizer from images, a transformer from a token cache or from images."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mvar_jax.data.pipeline import LoadOptions, Transform, eval_batches, train_batches
from mvar_jax.data.skipped import Skipped
from mvar_jax.data.sources import Source
from mvar_jax.errors import InputError
from mvar_jax.evaluation.pictures import side_by_side, tile_grid, to_uint8
from mvar_jax.model import Model
from mvar_jax.models.tokenizer import Tokenizer, quantizer_params
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import phase_macs
from mvar_jax.ops.pixels import as_images
from mvar_jax.ops.statistics import perplexity
from mvar_jax.sharding import check_batch_size, check_sizes, put_batch, replicated, use_mesh
from mvar_jax.store import initializer
from mvar_jax.training import tokenizer_step, transformer_step
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import TrainState, abstract_sharded, init_sharded, make_state

NUM_PICTURES = 16


def min_zoom(side: int) -> int:
    """Pixel repetition that makes small images visible."""
    return max(1, 96 // side)


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


class _Task:
    """State, batches and evaluation data: the part that does not depend on what is trained."""

    def __init__(self, run: RunOptions, module, data: dict[str, Source], transform: Transform, loading, extra):
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


def with_ids(tokenizer: Tokenizer, params, batch: dict) -> dict:
    """The batch with `ids` int32 [B, L]: its own or those of its images. In jit unused weights cost nothing."""
    if "ids" in batch:
        return batch
    ids_BL = tokenizer.apply({"params": params}, as_images(batch["image"]), method="encode")
    return {**{name: x for name, x in batch.items() if name != "image"}, "ids": ids_BL}


class TokenizerTask(_Task):
    """Trains the autoencoder and its codebook on images."""

    def __init__(
        self,
        run: RunOptions,
        tokenizer: Tokenizer,
        options,
        data: dict[str, Source],
        transform: Transform,
        loading: LoadOptions,
    ):
        options.check()
        zeros = {"hits": jnp.zeros((len(tokenizer.sides), tokenizer.vocab_size))}
        super().__init__(run, tokenizer, data, transform, loading, zeros)
        self.tokenizer, self.options = tokenizer, options
        static = (tokenizer, run.optimizer, options)
        step = functools.partial(tokenizer_step.train_step, *static, num_parts=run.accumulate_steps)
        placed = {"donate_argnums": 0, "out_shardings": (self.shardings, self._whole)}
        self._step = jax.jit(step, **placed)
        redraw = functools.partial(tokenizer_step.redraw_codes, tokenizer, options)
        self._redraw = jax.jit(redraw, **{**placed, "out_shardings": self.shardings})
        self._evaluate = jax.jit(self._eval_step, out_shardings=self._whole)

    def train_step(self, state, batch, step: int):
        """One step; redraws unused codes first where that is due."""
        with use_mesh(self.run.mesh):
            images = self.put(batch)
            if self.options.is_care_due(step):
                key = jax.random.fold_in(jax.random.key(self.run.seed), step)
                state = self._redraw(state, images, key)
            learning_rate, weight_decay = self.run.rates(step)
            state, metrics = self._step(state, images, learning_rate, weight_decay)
        return state, {**metrics, "learning_rate": learning_rate, "weight_decay": weight_decay}

    @functools.cached_property
    def _flops(self) -> float:
        image = jax.ShapeDtypeStruct((1, *(self.tokenizer.image_size,) * 2, 3), jnp.float32)
        params = self.abstract_state().params
        forward = jax.jit(lambda params, image: self.tokenizer.apply({"params": params}, image)[0])
        cost = forward.lower(params, image).cost_analysis() or {}
        return 3 * cost.get("flops", 0.0) * self.run.batch_size

    def flops_of_step(self, step: int) -> float:
        """Three forward passes' worth, as XLA counts them before optimising."""
        return self._flops

    def _eval_step(self, params, batch):
        """Sums over real rows: (squared error of clipped images a row, PSNR, hits [S, V], rows)."""
        images = as_images(batch["image"])
        rec, _, encoded = self.tokenizer.apply({"params": params}, images)
        error_B = jnp.mean(jnp.square(jnp.clip(rec, -1, 1) - images), axis=(1, 2, 3))
        psnr_B = 10 * jnp.log10(4 / error_B)
        mask = batch["mask"]
        V = self.tokenizer.vocab_size
        # a padding row's ids fall outside the codebook and are not counted
        ids_BL = jnp.where(mask[:, None] > 0, encoded.ids_BL, V)
        hits_SV = tokenizer_step.count_hits(ids_BL, self.tokenizer.sides, V + 1)[:, :V]
        return mask @ error_B, mask @ psnr_B, hits_SV, jnp.sum(mask)

    def evaluate(self, state) -> dict:
        """Held-out mse and PSNR (mean over images, dB) of the averaged weights; usage in percent and perplexity."""
        with use_mesh(self.run.mesh):
            parts = [self._evaluate(self.averaged(state), batch) for batch in self.eval_batches()]
        error, psnr, hits_SV, rows = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(4))
        return {
            "loss": float(error / rows),
            "psnr_db": float(psnr / rows),
            "usage_per_scale": (100 * (hits_SV > 0).mean(axis=1)).tolist(),
            "perplexity_per_scale": [perplexity(hits_V) for hits_V in hits_SV],
            "codebook_used_percent": float(100 * (hits_SV.sum(axis=0) > 0).mean()),
        }

    def pictures(self, state) -> dict[str, np.ndarray]:
        """Held-out images beside their reconstructions."""
        params = self.weights_at_hand(state)
        if jax.process_index():
            return {}
        data = self.data["val"]
        batches = eval_batches(data, self.transform, batch_size=min(NUM_PICTURES, len(data)), options=self.loading)
        images = as_images(jnp.asarray(next(batches)["image"]))
        batches.close()
        model = Model({"tokenizer": self.tokenizer}, {"tokenizer": params})
        reconstructions = np.asarray(model.decode(model.encode(images)))
        zoom = min_zoom(images.shape[1])
        return {"reconstructions": side_by_side(to_uint8(images), to_uint8(reconstructions), 4, zoom=zoom)}


class TransformerTask(_Task):
    """Trains the transformer on token ids; the teacher-forcing input is recomputed from them on the device.

    Where the data are images the tokenizer encodes them inside the same step program.
    """

    def __init__(
        self,
        run: RunOptions,
        transformer: Transformer,
        options: transformer_step.PhaseOptions,
        tokenizer: Tokenizer,
        tokenizer_params,
        data: dict[str, Source],
        transform: Transform,
        loading: LoadOptions,
        initial_params=None,
    ):
        options.check()
        super().__init__(run, transformer, data, transform, loading, {})
        self.initial_params = initial_params
        self.transformer, self.options = transformer, options
        self.tokenizer = tokenizer
        self.tokenizer_params = jax.tree.map(np.asarray, tokenizer_params)
        quantizer = quantizer_params(self.tokenizer_params)
        teacher_forcing = lambda ids_BL: tokenizer.apply(
            {"params": jax.tree.map(jnp.asarray, quantizer)}, ids_BL, method="teacher_forcing"
        )
        static = (transformer, teacher_forcing, run.optimizer, options, run.seed)

        def step(phases, state, batch, learning_rate, weight_decay, encoder_params):
            batch = with_ids(tokenizer, encoder_params, batch)
            rates = (learning_rate, weight_decay)
            return transformer_step.train_step(*static, phases, state, batch, *rates, run.accumulate_steps)

        def evaluate(params, batch, encoder_params):
            batch = with_ids(tokenizer, encoder_params, batch)
            return transformer_step.eval_step(transformer, teacher_forcing, params, batch)

        self._step = jax.jit(step, static_argnums=0, donate_argnums=1, out_shardings=(self.shardings, self._whole))
        self._evaluate = jax.jit(evaluate, out_shardings=self._whole)
        self._encoder_params = jax.device_put(self.tokenizer_params, self._whole)

    def train_step(self, state, batch, step: int):
        """One step over the phases that are due."""
        learning_rate, weight_decay = self.run.rates(step)
        phases = self.options.phases_of_step(self.transformer, step)
        with use_mesh(self.run.mesh):
            batch = self.put(batch)
            state, metrics = self._step(phases, state, batch, learning_rate, weight_decay, self._encoder_params)
        return state, {**metrics, "learning_rate": learning_rate, "weight_decay": weight_decay}

    def flops_of_step(self, step: int) -> float:
        """Three forward passes' worth over the tokens of the step's phases."""
        model = self.transformer
        sizes = (model.depth, model.width, model.vocab_size, model.code_width)
        phases = self.options.phases_of_step(model, step)
        return 6.0 * self.run.batch_size * sum(phase_macs(model.pyramid, phase, *sizes) for phase in phases)

    def evaluate(self, state) -> dict:
        """True token-weighted means over the validation split (averaged weights, no dropout), nats a token."""
        with use_mesh(self.run.mesh):
            params = self.averaged(state)
            parts = [self._evaluate(params, batch, self._encoder_params) for batch in self.eval_batches()]
        nll_S, hits_S, rows = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(3))
        areas = np.asarray(self.transformer.pyramid.areas)
        return {
            "loss": float(nll_S.sum() / rows / areas.sum()),
            "loss_per_scale": (nll_S / rows / areas).tolist(),
            "accuracy_per_scale": (hits_S / rows / areas).tolist(),
        }

    def pictures(self, state) -> dict[str, np.ndarray]:
        """One sample of each of the first classes from fixed seeds, guidance 1.5."""
        params = self.weights_at_hand(state)
        if jax.process_index():
            return {}
        modules = {"tokenizer": self.tokenizer, "transformer": self.transformer}
        model = Model(modules, {"tokenizer": self.tokenizer_params, "transformer": params})
        labels = np.arange(NUM_PICTURES) % self.transformer.num_classes
        images, _ = model.sample(labels, seed=self.run.seed, cfg=1.5)
        return {"samples": tile_grid(to_uint8(images), 8, zoom=min_zoom(images.shape[1]))}
