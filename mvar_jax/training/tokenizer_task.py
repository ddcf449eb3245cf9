"""The task that trains a tokenizer from images."""

import contextlib
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.data.pipeline import eval_batches
from mvar_jax.errors import InputError, RunError
from mvar_jax.files.images import min_zoom, side_by_side, to_uint8
from mvar_jax.models.init import abstract_params
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer, ids_params
from mvar_jax.ops.losses import sum_rows
from mvar_jax.ops.metrics import perplexity, psnr_of_error
from mvar_jax.ops.pixels import as_images
from mvar_jax.sampling.sampler import decode_in_chunks
from mvar_jax.sharding import use_mesh
from mvar_jax.training import tokenizer_step
from mvar_jax.training.initial import Initial
from mvar_jax.training.scoring import Scorer
from mvar_jax.training.state import TrainState
from mvar_jax.training.task import NUM_PICTURES, DataTask, RunOptions, TaskData


def check_train_parts(train_parts: str, options: tokenizer_step.CodebookOptions) -> None:
    """Raise InputError unless the parts are known and no option moves what they freeze."""
    known = tuple(tokenizer_step.TRAIN_PARTS)
    if train_parts not in known:
        expected = " or ".join(known)
        words = f"config.train_parts must be {expected}, got {train_parts!r}"
        raise InputError(words, field="config.train_parts", given=train_parts, expected=expected)
    for name in ("warmup_steps", "revive_every_steps"):
        if train_parts == "decoder" and (given := getattr(options, name)):
            field = f"config.codebook.{name}"
            words = f"{field} must be 0 with config.train_parts=decoder, which keeps the codebook, got {given}"
            raise InputError(words, field=field, given=given, expected="0")


def bit_sums(params: dict) -> jax.Array:
    """Return the sum of each leaf's bits as integers, modulo 2^32, uint32 [leaves]: equal on any mesh."""
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.stack([jnp.sum(as_bits(x), dtype=jnp.uint32) for x in jax.tree.leaves(params)])


class TokenizerTask(DataTask):
    """The task that trains an autoencoder and its codebook on images.

    scorer: of reconstructions of validation images, None scores none. initial: weights to start from, None for random
    ones. train_parts: see `TokenizerRecipe`.
    """

    metrics = ("loss", "psnr_db", "codebook_used_percent")

    def __init__(
        self,
        run: RunOptions,
        tokenizer: Tokenizer,
        options: tokenizer_step.CodebookOptions,
        data: TaskData,
        scorer: Scorer | None = None,
        initial: Initial | None = None,
        train_parts: str = "all",
    ):
        check_train_parts(train_parts, options)
        recipe = tokenizer_step.TokenizerRecipe(tokenizer, run.optimizer, options, run.accumulate_steps, train_parts)
        extra = {"hits": jnp.zeros((len(tokenizer.sides), tokenizer.vocab_size))}
        self._has_frozen = train_parts != "all"
        if self._has_frozen:
            shapes = nn.meta.unbox(abstract_params(tokenizer))
            extra["frozen_sums"] = jnp.zeros(len(jax.tree.leaves(ids_params(shapes))), jnp.uint32)
        super().__init__(run, tokenizer, data, extra, scorer, recipe.trained)
        self.initial, self.tokenizer, self.options = initial, tokenizer, options
        step = functools.partial(tokenizer_step.train_step, recipe)
        placed = {"donate_argnums": 0, "out_shardings": (self.shardings, self._whole)}
        self._step = jax.jit(step, **placed)
        redraw = functools.partial(tokenizer_step.redraw_codes, tokenizer, options)
        self._redraw = jax.jit(redraw, **{**placed, "out_shardings": self.shardings})
        self.evaluate_batch = jax.jit(self._eval_step, out_shardings=self._whole)
        self.reconstruct = jax.jit(self._reconstruct, out_shardings=self._whole)

    def init_state(self) -> TrainState:
        """Return the state of step 0; it keeps sums of the bits of what is frozen."""
        state = super().init_state()
        if self._has_frozen:
            with use_mesh(self.run.mesh):
                sums = jax.jit(bit_sums, out_shardings=self._whole)(ids_params(state.params))
            state = state.replace(extra={**state.extra, "frozen_sums": sums})
        return state

    def _check_frozen(self, state: TrainState) -> None:
        """Raise RunError unless frozen weights, and so the ids of every image, are those that the run began with."""
        with use_mesh(self.run.mesh):
            for params in (state.params, self.averaged(state)):
                sums = jax.jit(bit_sums, out_shardings=self._whole)(ids_params(params))
                if not np.array_equal(sums, state.extra["frozen_sums"]):
                    words = f"frozen weights changed by step {int(state.step)}, so its ids would be others"
                    raise RunError(f"{words}; resume from an earlier checkpoint")

    def train_step(self, state, batch, step: int):
        """Take one step; redraw unused codes first, if due."""
        with use_mesh(self.run.mesh):
            images = self.put(batch)
            if self.options.is_redraw_due(step):
                key = jax.random.fold_in(jax.random.key(self.run.seed), step)
                state = self._redraw(state, images, key)
            learning_rate, weight_decay = self.run.rates(step)
            state, metrics = self._step(state, images, learning_rate, weight_decay)
        return state, {**metrics, "learning_rate": learning_rate, "weight_decay": weight_decay}

    @functools.cached_property
    def _flops(self) -> float:
        image = jax.ShapeDtypeStruct((1, *(self.tokenizer.image_size,) * 2, 3), jnp.float32)
        params = self.abstract_state().params

        def cost(method, x) -> float:
            forward = jax.jit(lambda params, x: self.tokenizer.apply({"params": params}, x, method=method))
            return (forward.lower(params, x).cost_analysis() or {}).get("flops", 0.0)

        whole = cost(lambda module, image: module(image)[0], image)
        if not self._has_frozen:
            return 3 * whole * self.run.batch_size
        latent = jax.ShapeDtypeStruct((1, *(self.tokenizer.sides[-1],) * 2, self.tokenizer.code_width), jnp.float32)
        return (whole + 2 * cost("decode_raw", latent)) * self.run.batch_size

    def flops_of_step(self, step: int) -> float:
        """Return the forward pass, as XLA counts it before optimising, and twice that of the part that is trained."""
        return self._flops

    def _eval_step(self, params, batch):
        """Return sums over real rows: (squared error of the clipped image, its PSNR, hits [S, V], rows)."""
        images = as_images(batch["image"])
        rec, _, encoded = self.tokenizer.apply({"params": params}, images)
        error_B = jnp.mean(jnp.square(jnp.clip(rec, -1, 1) - images), axis=(1, 2, 3))
        psnr_B = psnr_of_error(error_B, 2)
        mask = batch["mask"]
        V = self.tokenizer.vocab_size
        # a padding row's ids fall outside the codebook and are not counted
        ids_BL = jnp.where(mask[:, None] > 0, encoded.ids_BL, V)
        hits_SV = tokenizer_step.count_hits(ids_BL, self.tokenizer.sides, V + 1)[:, :V]
        return sum_rows(mask, error_B), sum_rows(mask, psnr_B), hits_SV, jnp.sum(mask)

    def evaluate(self, state) -> dict:
        """Return held-out mse, PSNR (mean over images, dB), codebook usage and perplexity of the averaged weights.

        And the scores of reconstructions, if there is a scorer.
        """
        if self._has_frozen:
            self._check_frozen(state)
        if not self.has_evaluation:
            return {}
        with use_mesh(self.run.mesh):
            parts = [self.evaluate_batch(self.averaged(state), batch) for batch in self.eval_batches()]
        error, psnr, hits_SV, rows = (np.sum([np.asarray(part[i]) for part in parts], axis=0) for i in range(4))
        return {
            "loss": float(error / rows),
            "psnr_db": float(psnr / rows),
            "usage_per_scale": (100 * (hits_SV > 0).mean(axis=1)).tolist(),
            "perplexity_per_scale": [perplexity(hits_V) for hits_V in hits_SV],
            "codebook_used_percent": float(100 * (hits_SV.sum(axis=0) > 0).mean()),
            **self.scores(self._reconstructions(state)),
        }

    def _reconstructions(self, state) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (reconstructions, originals), uint8, of the first good validation images."""
        num_left = self.run.eval_samples
        # every process reads the same images and computes its part of them
        batches = eval_batches(self.data["val"], self.transform, batch_size=self.eval_rows, options=self.loading)
        with contextlib.closing(batches):
            for batch in batches:
                with use_mesh(self.run.mesh):
                    images = to_uint8(self.reconstruct(self.averaged(state), batch["image"]))
                rows = np.flatnonzero(batch["mask"])[:num_left]
                yield images[rows], batch["image"][rows]
                num_left -= len(rows)
                if not num_left:
                    return
        expected = f"at most {self.run.eval_samples - num_left}, the number of good validation images"
        words = f"config.eval_samples must be {expected}, got {self.run.eval_samples}"
        raise InputError(words, field="config.eval_samples", given=self.run.eval_samples, expected=expected)

    def _reconstruct(self, params, pixels_NYX3: jax.Array) -> jax.Array:
        networks = Networks(self.tokenizer, params)
        images = as_images(pixels_NYX3[self.picture_rows(len(pixels_NYX3))])
        ids_BL = networks.apply_tokenizer(images, method="encode")
        return decode_in_chunks(networks, networks.apply_tokenizer(ids_BL, method="f_hats")[-1])

    def pictures(self, state) -> dict[str, np.ndarray]:
        """Return held-out images, or training images if none are held out, next to their reconstructions."""
        data = self.data["val" if self.has_evaluation else "train"]
        # every process reads the same few images and computes its part of them
        batches = eval_batches(data, self.transform, batch_size=min(NUM_PICTURES, len(data)), options=self.loading)
        pixels = next(batches)["image"]
        batches.close()
        with use_mesh(self.run.mesh):
            reconstructions = np.asarray(self.reconstruct(self.averaged(state), pixels))[: len(pixels)]
        zoom = min_zoom(pixels.shape[1])
        return {"reconstructions": side_by_side(pixels, to_uint8(reconstructions), 4, zoom=zoom)}
