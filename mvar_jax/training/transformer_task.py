"""The task that trains a transformer from a token cache or from images."""

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.api import Model
from mvar_jax.data.pipeline import LoadOptions, Transform
from mvar_jax.data.sources import Source
from mvar_jax.files.images import min_zoom, tile_grid, to_uint8
from mvar_jax.models.tokenizer import Tokenizer, quantizer_params
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import phase_macs
from mvar_jax.ops.pixels import as_images
from mvar_jax.sharding import use_mesh
from mvar_jax.training import transformer_step
from mvar_jax.training.task import NUM_PICTURES, RunOptions, Task


def with_ids(tokenizer: Tokenizer, params, batch: dict) -> dict:
    """The batch with `ids` int32 [B, L]: its own or those of its images. In jit unused weights cost nothing."""
    if "ids" in batch:
        return batch
    ids_BL = tokenizer.apply({"params": params}, as_images(batch["image"]), method="encode")
    return {**{name: x for name, x in batch.items() if name != "image"}, "ids": ids_BL}


class TransformerTask(Task):
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
