"""The task that trains a tokenizer from images."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mvar_jax.data.pipeline import eval_batches
from mvar_jax.errors import InputError, RunError
from mvar_jax.files.images import min_zoom, side_by_side, tile_columns, to_uint8
from mvar_jax.models.init import abstract_params
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer, factor_codebook, fold_codebook, ids_params
from mvar_jax.ops.metrics import SSIM_WINDOW, perplexity, psnr_of_error, usage_percent
from mvar_jax.ops.pixels import as_images, from_levels
from mvar_jax.sampling.sampler import decode_in_chunks
from mvar_jax.sharding import batch_like, place, spec_of, use_mesh
from mvar_jax.training import tokenizer_step
from mvar_jax.training.adversary import Adversary, FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.initial import Initial
from mvar_jax.training.programs import TRAIN, Program
from mvar_jax.training.redraw import redraw_codes
from mvar_jax.training.saving import say
from mvar_jax.training.scoring import Scorer
from mvar_jax.training.state import TrainState
from mvar_jax.training.task import NUM_PICTURES, DataTask, RunOptions, TaskData
from mvar_jax.training.tokenizer_flops import TokenizerFlops, count_flops
from mvar_jax.training.train_parts import bit_sums, check_train_parts

NUM_ROWS = 8  # most images shown from the first 1, 2, ... scales


class TokenizerTask(DataTask):
    """The task that trains an autoencoder and its codebook on images.

    Args:
      run, data: of the run.
      tokenizer, options: what is trained, and its losses.
      scorer: of reconstructions of validation images, None scores none.
      adversary: None for a run without.
      fixed: weights that the losses need.
      initial: weights to start from, None for random ones.
      train_parts: see `TokenizerRecipe`.
    """

    def __init__(
        self,
        run: RunOptions,
        tokenizer: Tokenizer,
        options: CodebookOptions,
        data: TaskData,
        scorer: Scorer | None = None,
        adversary: Adversary | None = None,
        fixed: FixedWeights | None = None,
        initial: Initial | None = None,
        train_parts: str = "all",
    ):
        check_train_parts(train_parts, options)
        if initial is not None and options.simvq:
            words = "config.codebook.simvq must be False with config.init_from, whose codebook is not E W, got True"
            raise InputError(words, field="config.codebook.simvq", given=True, expected="False")
        self.tokenizer, self.options, self.adversary = tokenizer, options, adversary
        self._image_shape = (tokenizer.image_size, tokenizer.image_size, tokenizer.channels)
        has_ssim, has_lpips = tokenizer.image_size >= SSIM_WINDOW, fixed is not None and fixed.perceptual is not None
        names = ("loss", "psnr_db", "ssim" * has_ssim, "lpips" * has_lpips, "codebook_used_percent")
        self.metrics = tuple(filter(None, names))
        self._has_frozen = train_parts != "all"
        options.check_scales(len(tokenizer.sides))
        options.check_images(self._image_shape)
        options.check_steps(run.num_steps)
        if adversary is not None:
            adversary.check(run, self._image_shape, options.last_redraw)
        recipe = tokenizer_step.TokenizerRecipe(
            tokenizer, run.optimizer, options, run.accumulate_steps, run.seed, train_parts=train_parts
        )
        super().__init__(run, tokenizer, data, self._make_extra, scorer, recipe.trained)
        self.initial = initial
        self.fixed = place(fixed or FixedWeights(), self._whole)
        placed = {"donate_argnums": 0, "out_shardings": (self.shardings, self._whole)}
        # a program of its own before the discriminator starts
        self._step, self._adversarial_step = (
            jax.jit(functools.partial(tokenizer_step.train_step, dataclasses.replace(recipe, adversary=x)), **placed)
            for x in (None, adversary)
        )
        redraw = functools.partial(redraw_codes, tokenizer, options)
        self._redraw = jax.jit(redraw, **{**placed, "out_shardings": self.shardings})
        evaluate = functools.partial(tokenizer_step.evaluate_batch, tokenizer)
        self.evaluate_batch = jax.jit(evaluate, out_shardings=self._whole)
        self.encode_maps = jax.jit(self._encode_maps)
        self.decode_maps = jax.jit(self._decode_maps, out_shardings=self._whole)

    def _init_params(self, key: jax.Array):
        params = super()._init_params(key)
        return factor_codebook(params) if self.options.simvq else params

    def averaged(self, state):
        """Return the weights to evaluate, with an ordinary codebook."""
        params = super().averaged(state)
        if not self.options.simvq:
            return params
        params = fold_codebook(params)
        place = NamedSharding(self.run.mesh, spec_of(("vocab", "code")))
        return {**params, "codebook": jax.device_put(params["codebook"], place)}

    def _make_extra(self) -> dict:
        extra = {"hits": jnp.zeros((len(self.tokenizer.sides), self.tokenizer.vocab_size))}
        if self.adversary is not None:
            key = jax.random.fold_in(jax.random.key(self.run.seed, impl="rbg"), 1)  # 0 would be another run's
            extra["adversary"] = self.adversary.init_state(self.run.optimizer, key, self._image_shape)
        if self._has_frozen:
            shapes = nn.meta.unbox(abstract_params(self.tokenizer))
            extra["frozen_sums"] = jnp.zeros(len(jax.tree.leaves(ids_params(shapes))), jnp.uint32)
        return extra

    def init_state(self) -> TrainState:
        """Return the state of step 0, with sums of the bits of what is frozen; say if an adversary has no LPIPS."""
        if self.adversary is not None and not self.options.perceptual_weight:
            say("config.codebook.perceptual_weight is 0: the adversary is balanced against L1 and L2 alone")
        state = super().init_state()
        if self._has_frozen:
            with use_mesh(self.run.mesh):
                sums = jax.jit(bit_sums, out_shardings=self._whole)(ids_params(state.params))
            state = state.replace(extra={**state.extra, "frozen_sums": sums})
        return state

    def _check_frozen(self, state: TrainState) -> None:
        """Raise RunError if a frozen weight has changed since step 0: the ids of images would be others."""
        with use_mesh(self.run.mesh):
            for params in (state.params, self.averaged(state)):
                sums = jax.jit(bit_sums, out_shardings=self._whole)(ids_params(params))
                if not np.array_equal(sums, state.extra["frozen_sums"]):
                    words = f"frozen weights changed by step {int(state.step)}, so its ids would be others"
                    raise RunError(f"{words}; resume from an earlier checkpoint")

    def train_step(self, state, batch, step: int):
        """Take one step; redraw unused codes first, if due."""
        is_adversarial = self.adversary is not None and step >= self.adversary.options.start_step
        with use_mesh(self.run.mesh):
            images = self.put(batch)
            if self.options.is_redraw_due(step):
                key = jax.random.fold_in(jax.random.key(self.run.seed), step)
                state = self._redraw(state, images, key)
            learning_rate, weight_decay = self.run.rates(step)
            rates, metrics = {"learning_rate": learning_rate, "weight_decay": weight_decay}, {}
            if is_adversarial:
                rate = self.adversary.options.rate_at(step, learning_rate)
                state, metrics = self._adversarial_step(state, images, learning_rate, weight_decay, rate, self.fixed)
                rates["discriminator_learning_rate"] = rate
            else:
                state, metrics = self._step(state, images, learning_rate, weight_decay, 0.0, self.fixed)
        return state, {**metrics, **rates}

    def flops_of_step(self, step: int) -> float:
        """Return the FLOPs of all networks."""
        is_adversarial = self.adversary is not None and step >= self.adversary.options.start_step
        return self._flops.of_step(is_adversarial) * self.run.batch_size

    def programs(self, num_samples: int) -> list[Program]:
        """Return the steps before and with the discriminator, and the redrawing of codes."""
        run, state, B = self.run, self.abstract_state(), self.run.batch_size
        batch = batch_like(run.mesh, image=((B, *self._image_shape), "uint8"), index=((B,), "uint32"))
        start = run.num_steps if self.adversary is None else min(self.adversary.options.start_step, run.num_steps)
        rates, found = run.rates(0), []
        for name, step, rate, first, end in (
            ("step", self._step, 0.0, 0, start),
            ("step with discriminator", self._adversarial_step, rates[0], start, run.num_steps),
        ):
            if end > first:
                arguments = state, batch, *rates, rate, self.fixed
                found.append(Program(TRAIN, name, step, arguments, end - first, B, self.flops_of_step(first), state))
        if redraws := sum(map(self.options.is_redraw_due, range(self.options.last_redraw + 1))):
            arguments = state, batch, jax.eval_shape(lambda: jax.random.key(0))
            found.append(Program(TRAIN, "redraw of codes", self._redraw, arguments, redraws, 0, 0.0, state))
        return found

    @functools.cached_property
    def _flops(self) -> TokenizerFlops:
        has_perceptual = bool(self.options.perceptual_weight)
        networks = self._has_frozen, has_perceptual, self.adversary, self.fixed
        return count_flops(self.tokenizer, self.abstract_state(), *networks)

    def evaluate(self, state) -> dict:
        """Return held-out mse, PSNR (dB), SSIM and LPIPS, means over images, codebook usage and perplexity.

        Of the averaged weights. And the scores of reconstructions, if there is a scorer.
        """
        if self._has_frozen:
            self._check_frozen(state)
        if not self.has_evaluation:
            return {}
        with use_mesh(self.run.mesh):
            params = self.averaged(state)
            parts = [self.evaluate_batch(params, batch, self.fixed) for batch in self.eval_batches()]
        sums, hits_SV, rows = jax.tree.map(lambda *part: np.sum([np.asarray(x) for x in part], axis=0), *parts)
        return {
            **{name: float(total / rows) for name, total in sums.items()},
            "usage_per_scale": (100 * (hits_SV > 0).mean(axis=1)).tolist(),
            "own_usage_per_scale": usage_percent(hits_SV, hits_SV.sum(axis=1)).tolist(),
            "perplexity_per_scale": [perplexity(hits_V) for hits_V in hits_SV],
            "codebook_used_percent": float(100 * (hits_SV.sum(axis=0) > 0).mean()),
            "psnr_per_scale_db": self._psnr_per_scale(state),
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
                    images = self.reconstruct(self.averaged(state), batch["image"])
                rows = np.flatnonzero(batch["mask"])[:num_left]
                yield images[rows], batch["image"][rows]
                num_left -= len(rows)
                if not num_left:
                    return
        expected = f"at most {self.run.eval_samples - num_left}, the number of good validation images"
        words = f"config.eval_samples must be {expected}, got {self.run.eval_samples}"
        raise InputError(words, field="config.eval_samples", given=self.run.eval_samples, expected=expected)

    def _encode_maps(self, params, pixels_NYXC: jax.Array) -> tuple[jax.Array, ...]:
        """Return the latent maps after each scale; rows are repeated until they divide over the devices."""
        networks = Networks(self.tokenizer, params)
        images = as_images(pixels_NYXC[self.picture_rows(len(pixels_NYXC))])
        ids_BL = networks.apply_tokenizer(images, method="encode")
        return networks.apply_tokenizer(ids_BL, method="f_hats")

    def _decode_maps(self, params, f_hat_BYXc: jax.Array) -> jax.Array:
        return decode_in_chunks(Networks(self.tokenizer, params), f_hat_BYXc)

    def reconstruct(self, params, pixels_NYXC: np.ndarray) -> np.ndarray:
        """Return the reconstructions of pixels, uint8."""
        decoded = self.decode_maps(params, self.encode_maps(params, pixels_NYXC)[-1])
        return to_uint8(decoded)[: len(pixels_NYXC)]

    def _shown(self, state) -> tuple[np.ndarray, np.ndarray]:
        """Return a few held-out images, or training images if none are held out, and what each scale makes of them.

        Pixels `[N, Y, X, C] uint8`, and the reconstructions from the first 1, 2, ... S scales, `[S, N, Y, X, C]` in
        [-1, 1].
        """
        data = self.data["val" if "val" in self.data else "train"]
        # every process reads the same few images and computes its part of them
        batches = eval_batches(data, self.transform, batch_size=min(NUM_PICTURES, len(data)), options=self.loading)
        pixels = next(batches)["image"]
        batches.close()
        params = self.averaged(state)
        with use_mesh(self.run.mesh):
            # scale by scale: XLA gathers whole weights on each device if it decodes all scales at once
            decoded = [self.decode_maps(params, f_hat) for f_hat in self.encode_maps(params, pixels)]
        return pixels, np.stack([np.asarray(images)[: len(pixels)] for images in decoded])

    def _psnr_per_scale(self, state) -> list[float]:
        """Return the PSNR of the first 1, 2, ... S scales, the mean over the images of `pictures`."""
        pixels, decoded = self._shown(state)
        error_SN = np.mean(np.square(decoded - from_levels(pixels)), axis=(2, 3, 4))
        return psnr_of_error(error_SN, 2).mean(1).tolist()

    def pictures(self, state) -> dict[str, np.ndarray]:
        """Return held-out images, or training images if none are held out, next to their reconstructions.

        `reconstructions` uses all scales; `scales` shows some images after the first 1, 2, ... of them.
        """
        pixels, decoded = self._shown(state)
        zoom = min_zoom(pixels.shape[1])
        some = slice(0, None, -(-len(pixels) // NUM_ROWS))  # spread over all
        columns = {f"r{k}": to_uint8(images[some]) for k, images in enumerate(decoded, start=1)}
        return {
            "reconstructions": side_by_side(pixels, to_uint8(decoded[-1]), 4, zoom=zoom),
            "scales": tile_columns({"input": pixels[some], **columns}, zoom=zoom),
        }

    def histograms(self, state) -> dict[str, np.ndarray]:
        """Return hits of each scale's codes, as multiples of their mean, and usage and perplexity of all scales.

        They are those of the moving average of training; nothing before the first step.
        """
        hits_SV = np.asarray(state.extra["hits"])
        means_S1 = hits_SV.mean(axis=1, keepdims=True)
        if not means_S1.all():
            return {}
        usage = tokenizer_step.describe_usage(hits_SV, self.run.batch_size, self.tokenizer.sides)
        names = ("own_usage_per_scale", "perplexity_per_scale")
        by_scale = {f"hits/scale_{scale}": hits_V for scale, hits_V in enumerate(hits_SV / means_S1)}
        return {f"codes/{name}": values for name, values in (by_scale | {n: usage[n] for n in names}).items()}
