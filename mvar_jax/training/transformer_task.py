"""The task that trains a transformer from a token cache or from images."""

import abc
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np

from mvar_jax.checkpoints.model_directory import fingerprint, ids_fingerprint
from mvar_jax.files.images import min_zoom, tile_grid, to_uint8
from mvar_jax.models.networks import Networks
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import phase_macs
from mvar_jax.ops.pixels import as_images
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.bulk import place_networks
from mvar_jax.sampling.order import spread_labels
from mvar_jax.sampling.sampler import SampleOptions, sample
from mvar_jax.scales import Phase
from mvar_jax.sharding import batch_like, constrain, is_abstract, map_rows, num_shards_of, use_mesh
from mvar_jax.training import transformer_step
from mvar_jax.training.initial import Initial
from mvar_jax.training.programs import SAMPLE, TRAIN, Program
from mvar_jax.training.scoring import Scorer
from mvar_jax.training.task import NUM_PICTURES, DataTask, RunOptions, TaskData


def with_input(networks: Networks, batch: dict, num_together: int | None = None) -> dict:
    """Return the batch with `ids` int32 [B, L], encoded from its images if absent, and the teacher-forcing input.

    num_together: images that each device encodes at once, None for all.
    """
    if "ids" not in batch:
        encode = lambda images: networks.apply_tokenizer(as_images(images), method="encode")
        ids_BL = map_rows(encode, batch["image"], num_together or len(batch["image"]))
        batch = {**{name: x for name, x in batch.items() if name != "image"}, "ids": ids_BL}
    return {**batch, "previous": networks.apply_tokenizer(batch["ids"], method="teacher_forcing")}


class TokenTask(DataTask):
    """What the tasks that learn to predict token ids share; the ids' input is recomputed on the device.

    If the data are images, the tokenizer encodes them inside the same step program.

    Attributes:
      transformer: the module that is trained or refined.
      tokenizer: frozen networks: a tokenizer, one copy on each device, and what else is not trained.
    """

    metrics = ("loss",)

    def __init__(
        self,
        run: RunOptions,
        module: nn.Module,
        transformer: Transformer,
        options: transformer_step.PhaseOptions,
        tokenizer: Networks,
        data: TaskData,
        initial: Initial | None = None,
        scorer: Scorer | None = None,
    ):
        super().__init__(run, module, data, dict, scorer)
        self.initial = initial
        if not is_abstract(tokenizer):
            parts = tokenizer.tokenizer, tokenizer.tokenizer_params
            self.data_identity |= {"tokenizer": fingerprint(*parts), "tokenizer_ids": ids_fingerprint(*parts)}
            tokenizer = jax.tree.map(np.asarray, tokenizer)
        self.transformer, self.options = transformer, options
        self.tokenizer = place_networks(tokenizer, run.mesh)
        self._step = jax.jit(
            self._take_step, static_argnums=0, donate_argnums=1, out_shardings=(self.shardings, self._whole)
        )
        self.evaluate_batch = jax.jit(self._sum_losses, out_shardings=self._whole)
        self.draw_pictures = jax.jit(self._draw_pictures, out_shardings=self._whole)
        self.draw_samples = jax.jit(self._draw_samples, out_shardings=self._whole)

    @property
    @abc.abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """Return all phases that are trained."""

    def phases_of_step(self, step: int) -> tuple[Phase, ...]:
        """Return the phases that iteration `step` trains by the schedule."""
        return self.options.due(self.phases, step)

    def scales_of_step(self, step: int) -> tuple[int, ...]:
        """Return the scales of the step's phases."""
        return tuple(scale for phase in self.phases_of_step(step) for scale in range(phase.first, phase.last + 1))

    @abc.abstractmethod
    def networks_of(self, params, tokenizer: Networks) -> Networks:
        """Return the networks whose trained weights are `params`. tokenizer: the frozen ones."""

    @abc.abstractmethod
    def _take_step(self, phases, state, batch, learning_rate, weight_decay, tokenizer: Networks):
        """Return (state, metrics), inside a program."""

    @abc.abstractmethod
    def _sum_losses(self, params, batch, tokenizer: Networks):
        """Return sums over a batch, see `transformer_step.eval_step`, inside a program."""

    def train_step(self, state, batch, step: int):
        """Take one step over the phases that are due."""
        learning_rate, weight_decay = self.run.rates(step)
        phases = self.phases_of_step(step)
        with use_mesh(self.run.mesh):
            batch = self.put(batch)
            state, metrics = self._step(phases, state, batch, learning_rate, weight_decay, self.tokenizer)
        return state, {**metrics, "learning_rate": learning_rate, "weight_decay": weight_decay}

    def programs(self, num_samples: int) -> list[Program]:
        """Return the steps of every phase and the sampler."""
        B, state, run = self.run.batch_size, self.abstract_state(), self.run
        arrays: dict[str, tuple[tuple[int, ...], str]] = {"label": ((B,), "int32"), "index": ((B,), "uint32")}
        if self.transform is None:
            arrays["ids"] = (B, self.transformer.pyramid.num_tokens), "int32"
        else:
            tokenizer = self.tokenizer.tokenizer
            arrays["image"] = (B, *[tokenizer.image_size] * 2, tokenizer.channels), "uint8"
        batch, rates = batch_like(run.mesh, **arrays), run.rates(0)
        dues = [self.phases_of_step(step) for step in range(self.options.cycle(len(self.phases)))]
        found = []
        for phases in dict.fromkeys(dues):
            name = f"step, {sum(phase.num_tokens for phase in phases)} tokens"
            runs, flops = run.num_steps * dues.count(phases) / len(dues), self.flops_of_step(dues.index(phases))
            arguments = phases, state, batch, *rates, self.tokenizer
            found.append(Program(TRAIN, name, self._step, arguments, runs, B, flops, state))
        index = batch_like(run.mesh, index=((num_samples,), "int32"))["index"]
        arguments = self.averaged(state), self.tokenizer, index, index
        return [*found, Program(SAMPLE, f"sample {num_samples}", self.draw_samples, arguments, 0, num_samples)]

    @property
    def rows_together(self) -> int:
        """Return the rows of a part of the batch on each device."""
        return self.run.batch_size // self.run.accumulate_steps // num_shards_of("batch", self.run.mesh)

    def _macs(self, phases: tuple[Phase, ...]) -> int:
        """Return the multiply-accumulates of one forward pass of the transformer, for one image."""
        model = self.transformer
        sizes = (model.depth, model.width, model.vocab_size, model.code_width)
        return sum(phase_macs(model.pyramid, phase, *sizes) for phase in phases)

    def evaluate(self, state) -> dict:
        """Return token-weighted means over the validation split, in nats a token, and scores of samples.

        Of the averaged weights, without dropout.
        """
        return self._measure_losses(state) | self.scores(self._samples(state))

    def _measure_losses(self, state) -> dict:
        if "val" not in self.data:
            return {}
        with use_mesh(self.run.mesh):
            params = self.averaged(state)
            parts = [self.evaluate_batch(params, batch, self.tokenizer) for batch in self.eval_batches()]
        nll_S, hits_S, rows = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(3))
        areas = np.asarray(self.transformer.pyramid.areas)
        return {
            "loss": float(nll_S.sum() / rows / areas.sum()),
            "loss_per_scale": (nll_S / rows / areas).tolist(),
            "accuracy_per_scale": (hits_S / rows / areas).tolist(),
        }

    def _samples(self, state) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (pixels uint8, labels) of the samples that are scored, round-robin over the classes."""
        N, size = self.run.eval_samples, self.eval_rows
        labels_N = spread_labels(self.transformer.num_classes, N)
        for begin in range(0, N, size):
            index = np.minimum(np.arange(begin, begin + size), N - 1)
            labels = labels_N[index]
            with use_mesh(self.run.mesh):
                pixels = np.asarray(self.draw_samples(self.averaged(state), self.tokenizer, labels, index))
            yield pixels[: N - begin], labels[: N - begin]

    def _draw_samples(self, params, tokenizer: Networks, labels_B, index_B) -> jax.Array:
        networks = self.networks_of(params, tokenizer)
        labels, index = (constrain(x, "batch") for x in (labels_B, index_B))
        keys = keys_of_samples(self.run.seed, index)
        return sample(networks, labels, keys, self.run.eval_sampling, ("pixels",))[0]

    def _draw_pictures(self, params, tokenizer: Networks) -> jax.Array:
        index = self.picture_rows()
        networks = self.networks_of(params, tokenizer)
        labels, keys = index % self.transformer.num_classes, keys_of_samples(self.run.seed, index)
        return sample(networks, labels, keys, SampleOptions(cfg=1.5), ("images",))[0]

    def pictures(self, state) -> dict[str, np.ndarray]:
        """Return one sample of each of the first classes, from fixed seeds and guidance 1.5."""
        with use_mesh(self.run.mesh):
            images = np.asarray(self.draw_pictures(self.averaged(state), self.tokenizer))[:NUM_PICTURES]
        return {"samples": tile_grid(to_uint8(images), 8, zoom=min_zoom(images.shape[1]))}


class TransformerTask(TokenTask):
    """The task that trains a transformer on token ids.

    tokenizer: networks without a transformer. initial: weights to start from, None for random ones. scorer: of
    samples, None draws none.
    """

    def __init__(
        self,
        run: RunOptions,
        transformer: Transformer,
        options: transformer_step.PhaseOptions,
        tokenizer: Networks,
        data: TaskData,
        initial: Initial | None = None,
        scorer: Scorer | None = None,
    ):
        self._recipe = transformer_step.TransformerRecipe(
            transformer, run.optimizer, options, run.seed, run.accumulate_steps
        )
        super().__init__(run, transformer, transformer, options, tokenizer, data, initial, scorer)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the transformer's phases."""
        return self.transformer.phases()

    def networks_of(self, params, tokenizer: Networks) -> Networks:
        """Return the tokenizer with the transformer."""
        return tokenizer.replace(transformer=self.transformer, params=params)

    def _take_step(self, phases, state, batch, learning_rate, weight_decay, tokenizer: Networks):
        batch = with_input(tokenizer, batch, self.rows_together)
        return transformer_step.train_step(self._recipe, phases, state, batch, learning_rate, weight_decay)

    def _sum_losses(self, params, batch, tokenizer: Networks):
        return transformer_step.eval_step(self.transformer, params, with_input(tokenizer, batch))

    def flops_of_step(self, step: int) -> float:
        """Return three times the forward pass of the step's phases."""
        return 6.0 * self.run.batch_size * self._macs(self.phases_of_step(step))
