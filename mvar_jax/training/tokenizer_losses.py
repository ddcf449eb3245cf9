"""The losses of a tokenizer and their gradients, with and without an adversary (docs/method.md, Training)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mvar_jax.models.autoencoder import LAST_FEATURES, conv
from mvar_jax.models.lpips import lpips_loss
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.ops.adversarial import (
    LogitMeans,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_loss,
)
from mvar_jax.ops.augment import Pass, augment, draw_augmentations
from mvar_jax.ops.precision import computing
from mvar_jax.sharding import constrain
from mvar_jax.training.accumulate import split_parts
from mvar_jax.training.adversary import Adversary, FixedWeights, train_state
from mvar_jax.training.optimizer import OptimizerOptions, apply_gradients


class PixelWeights(NamedTuple):
    """Weights of the losses of a reconstruction's pixels: L1, L2 and LPIPS."""

    l1: float
    l2: float
    perceptual: float = 0.0


def apply_training(model: Tokenizer, params: Any, *args):
    """Return (outputs of the tokenizer's training pass, input of the decoder's last convolution)."""
    images_BYXC, *rest = args
    by_rows = lambda x: constrain(x, "batch", None, None, None)  # its gradient too
    (rec_BYXC, *more), found = model.apply({"params": params}, by_rows(images_BYXC), *rest, mutable=[LAST_FEATURES])
    return (by_rows(rec_BYXC), *more), found[LAST_FEATURES]["decoder"]["x"][0]


def pixel_loss(weights: PixelWeights, fixed: FixedWeights, rec_BYXC: jax.Array, images_BYXC: jax.Array):
    """Return (loss, parts) of the raw reconstruction: weighted L1, L2 and LPIPS, means over the batch.

    parts: `l1_loss`, `l2_loss`, `perceptual_loss` if it has a weight, and `mse` of the clipped reconstruction.
    """
    error = rec_BYXC - images_BYXC
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    clipped = jnp.mean(jnp.square(jnp.clip(rec_BYXC, -1, 1) - images_BYXC))
    loss, parts = weights.l1 * l1 + weights.l2 * l2, {"l1_loss": l1, "l2_loss": l2, "mse": clipped}
    if weights.perceptual:
        parts["perceptual_loss"] = lpips_loss(fixed.perceptual, rec_BYXC, images_BYXC)
        loss += weights.perceptual * parts["perceptual_loss"]
    return loss, parts


class Judged(NamedTuple):
    """What an adversarial step needs of a part of the batch: all are means over its rows.

    Attributes:
      loss: of the pixels, without the adversarial one.
      parts: numbers for the log.
      kernels: gradients of the decoder's last kernel, of the pixel loss and of the adversarial loss.
      discriminator: gradients of the discriminator's loss.
      spectral: the discriminator's spectral vectors after its pass.
    """

    loss: jax.Array
    parts: dict[str, jax.Array]
    kernels: tuple[jax.Array, jax.Array]
    discriminator: Any
    spectral: Any


class Generated(NamedTuple):
    """The result of `adversarial_gradients`.

    Attributes:
      loss: of the generator.
      parts: numbers for the log, and what else `forward` gives; means over the batch.
      grads: of the generator.
      discriminator_grads: of the discriminator.
      spectral: its spectral vectors after its pass.
    """

    loss: jax.Array
    parts: dict[str, jax.Array]
    grads: Any
    discriminator_grads: Any
    spectral: Any


class Judge(NamedTuple):
    """The losses of one step, to judge reconstructions with.

    Attributes:
      model: the tokenizer.
      weights: of the pixel losses.
      adversary: the discriminator.
      fixed: weights of LPIPS and of the discriminator's frozen part.
      last: parameters of the decoder's last convolution.
      state: the discriminator's part of the state, as it was before this step.
    """

    model: Tokenizer
    weights: PixelWeights
    adversary: Adversary
    fixed: FixedWeights
    last: dict[str, jax.Array]
    state: dict[str, Any]

    def logits(self, params: Any, spectral: Any, images_BYXC: jax.Array, draws_BN: jax.Array | None, mutable=False):
        """Return the discriminator's logits of augmented images; with `mutable` also its new spectral vectors."""
        network = self.adversary.network
        if draws_BN is not None:
            images_BYXC = augment(images_BYXC, draws_BN, network.crop_side)  # type: ignore[attr-defined]
        variables = {"params": params, "spectral": spectral}
        if self.fixed.discriminator is not None:
            variables["frozen"] = self.fixed.discriminator
        if not mutable:
            return network.apply(variables, images_BYXC)
        logits, moved = network.apply(variables, images_BYXC, mutable=["spectral"])
        return logits, jax.lax.stop_gradient(moved.get("spectral", spectral))

    def kernel_gradient(self, features_BYXC: jax.Array, cotangent_BYXC: jax.Array) -> jax.Array:
        """Return the gradient of the decoder's last kernel from the reconstruction's, by the last convolution alone.

        features_BYXC: what that convolution got.
        """
        dtype = self.model.decoder_dtype
        layer = conv(cotangent_BYXC.shape[-1], 3, dtype)

        def last(kernel):
            with computing(self.model.precision):
                params = {**self.last, "kernel": kernel}
                return layer.apply({"params": params}, features_BYXC).astype(jnp.float32)

        return jax.vjp(last, self.last["kernel"])[1](cotangent_BYXC)[0]

    def __call__(self, rec_BYXC: jax.Array, features_BYXC: jax.Array, rows: dict) -> tuple[Judged, tuple]:
        """Return (Judged, gradients of the pixel loss and of the adversarial loss at the reconstruction)."""
        draws = lambda of: rows["draws"][:, of] if "draws" in rows else None
        state, images = self.state, rows["image"]
        of_pixels = jax.value_and_grad(lambda rec: pixel_loss(self.weights, self.fixed, rec, images), has_aux=True)
        (loss, parts), pixel_grads = of_pixels(rec_BYXC)

        def adversarial(rec):  # the discriminator from before its update
            return generator_loss(self.logits(state["params"], state["spectral"], rec, draws(Pass.GENERATOR)))

        adversarial_loss, adversarial_grads = jax.value_and_grad(adversarial)(rec_BYXC)
        kernels = tuple(self.kernel_gradient(features_BYXC, grads) for grads in (pixel_grads, adversarial_grads))

        def discriminate(params):
            real_BN, spectral = self.logits(params, state["spectral"], images, draws(Pass.REAL), mutable=True)
            fake_BN = self.logits(params, spectral, jax.lax.stop_gradient(rec_BYXC), draws(Pass.FAKE))
            hinge = discriminator_loss(real_BN, fake_BN)
            lecam = lecam_loss(real_BN, fake_BN, LogitMeans(**state["means"]))
            told = {"discriminator_loss": hinge, "real_logits": jnp.mean(real_BN), "fake_logits": jnp.mean(fake_BN)}
            return hinge + self.adversary.options.lecam_weight * lecam, (told | {"lecam_loss": lecam}, spectral)

        (_, (told, spectral)), grads = jax.value_and_grad(discriminate, has_aux=True)(state["params"])
        parts |= told | {"adversarial_loss": adversarial_loss}
        by_rows = lambda x: constrain(x, "batch", None, None, None)
        pixels = by_rows(pixel_grads), by_rows(adversarial_grads)
        return Judged(loss, parts, kernels, grads, spectral), pixels


def draw_passes(seed: int, index_B: jax.Array, step: jax.Array) -> jax.Array:
    """Return the numbers of each sample's augmentations in each `Pass`, `[B, passes, N] float32`."""
    return jnp.stack([draw_augmentations(seed, index_B, step, of) for of in Pass], axis=1)


def adversarial_gradients(forward, params, rows: dict, num_parts: int, judge: Judge, weight: jax.Array) -> Generated:
    """Return the gradients of both networks, with one backward pass through the autoencoder.

    Both losses' gradients are taken at the pixels. Their gradients of the decoder's last kernel, which give the
    adaptive weight, need that convolution's backward pass alone; then the weighted sum goes back once. With several
    parts, the weight comes from the sums over all, so the forward pass runs again.

    Args:
      forward: (params, rows) -> ((reconstruction, loss that does not come by the pixels), (input of the decoder's
        last convolution, parts)), means over rows.
      params: what of the generator's parameters is trained.
      rows: arrays `[B, ...]`, among them `image`, and `draws` of `draw_passes` if there is augmentation.
      num_parts: equal parts of the batch whose gradients are accumulated.
      judge: the losses of the step.
      weight: of the adversarial loss, times the adaptive one.
    """

    def judge_part(part):
        outputs, pull, (features, parts) = jax.vjp(lambda p: forward(p, part), params, has_aux=True)
        judged, pixels = judge(outputs[0], features, part)
        return (judged, outputs[1], parts), pixels, pull

    def weigh(judged):
        factor = adaptive_weight(*judged.kernels) if judge.adversary.options.adaptive else jnp.ones(())
        return factor, weight * factor

    def cotangents(pixels, total):
        return pixels[0] + total * pixels[1], jnp.ones(())

    if num_parts == 1:
        (judged, other_loss, parts), pixels, pull = judge_part(rows)
        factor, total = weigh(judged)
        (grads,) = pull(cotangents(pixels, total))
    else:
        add = lambda total, new: jax.tree.map(jnp.add, total, new)
        split = split_parts(rows, num_parts)
        zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        first = jax.tree.map(lambda x: x[0], split)
        sums = zeros(jax.eval_shape(lambda part: judge_part(part)[0], first))

        def look(total, part):
            found, pixels, _ = judge_part(part)
            return add(total, found), pixels

        sums, pixels_of_parts = jax.lax.scan(look, sums, split)
        judged, other_loss, parts = jax.tree.map(lambda x: x / num_parts, sums)
        factor, total = weigh(judged)

        def pull_part(grads, one):
            part, pixels = one
            pull = jax.vjp(lambda p: forward(p, part)[0], params)[1]
            return add(grads, pull(cotangents(pixels, total))[0]), None

        grads, _ = jax.lax.scan(pull_part, zeros(jax.eval_shape(lambda p: p, params)), (split, pixels_of_parts))
        grads = jax.tree.map(lambda x: x / num_parts, grads)
    loss = judged.loss + other_loss + total * judged.parts["adversarial_loss"]
    parts = parts | judged.parts | {"adaptive_weight": factor}
    return Generated(loss, parts, grads, judged.discriminator, judged.spectral)


def checked_loss(generated: Generated, grads: Any) -> jax.Array:
    """Return a number that is finite only if losses and gradients of both networks are.

    grads: the generator's.
    """
    losses = [generated.loss, generated.parts["discriminator_loss"], generated.parts["lecam_loss"]]
    return sum(losses[1:], losses[0]) + optax.tree.norm(grads) + optax.tree.norm(generated.discriminator_grads)


def train_discriminator(
    adversary: Adversary,
    optimizer: OptimizerOptions,
    part: dict[str, Any],
    generated: Generated,
    learning_rate: jax.Array | float,
    weight_decay: jax.Array | float,
    checked: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Return (the discriminator's part of the state after its update, its numbers for the log).

    optimizer: the generator's. checked: `checked_loss`; if it is not finite, only `step` changes.
    """
    own = adversary.options.optimizer(optimizer)
    grads = generated.discriminator_grads
    moved, metrics = apply_gradients(own, train_state(part), grads, learning_rate, weight_decay, loss=checked)
    real, fake = (generated.parts[name] for name in ("real_logits", "fake_logits"))
    means = LogitMeans(**part["means"]).updated(real, fake, adversary.options.lecam_decay)
    fresh = {"spectral": generated.spectral, "means": {"real": means.real, "fake": means.fake}}
    kept = {name: part[name] for name in fresh}
    fresh = jax.tree.map(lambda new, old: jnp.where(metrics["is_bad"], old, new), fresh, kept)
    told = {"discriminator_grad_norm": metrics["grad_norm"]}
    return {"params": moved.params, "opt_state": moved.opt_state, "step": moved.step, **fresh}, told
