"""FLOPs of a tokenizer's training, from each network's forward pass as XLA counts it before optimising."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mvar_jax.models.lpips import lpips_loss
from mvar_jax.models.lpips import shapes as lpips_shapes
from mvar_jax.models.tokenizer import Tokenizer, multiply_codebook
from mvar_jax.training.adversary import Adversary, FixedWeights
from mvar_jax.training.state import TrainState


class TokenizerFlops(NamedTuple):
    """FLOPs of each network's forward pass for one image. A network that the run does not have counts 0.

    Attributes:
      tokenizer: encoder, quantizer and decoder.
      trained: the part of it whose parameters are trained.
      perceptual: LPIPS's network.
      discriminator: with its frozen part.
    """

    tokenizer: float
    trained: float
    perceptual: float
    discriminator: float

    def of_step(self, is_adversarial: bool) -> float:
        """Return the FLOPs of a step for one image.

        The autoencoder: a forward pass and two for the gradients of what is trained. LPIPS: two images, and back to
        one of them. The discriminator: two images with all gradients, and once more for the generator, back to the
        image.
        """
        flops = self.tokenizer + 2 * self.trained + 3 * self.perceptual
        return flops + 8 * self.discriminator * is_adversarial


def _count(forward, *args) -> float:
    """Return the FLOPs of a function, lowered without the mesh: its devices may not be on this machine."""
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return (jax.jit(forward).lower(*args).cost_analysis() or {}).get("flops", 0.0)


def count_flops(
    tokenizer: Tokenizer,
    state: TrainState,
    is_decoder_alone: bool,
    has_perceptual: bool,
    adversary: Adversary | None,
    fixed: FixedWeights,
) -> TokenizerFlops:
    """Count the FLOPs of a run's networks.

    Args:
      tokenizer, state: what is trained, and the shapes of its state.
      is_decoder_alone: whether the decoder alone is trained.
      has_perceptual: whether the loss has LPIPS.
      adversary: None for a run without.
      fixed: weights, or their shapes, that the losses need.
    """
    image = jax.ShapeDtypeStruct((1, tokenizer.image_size, tokenizer.image_size, tokenizer.channels), jnp.float32)
    params = jax.eval_shape(multiply_codebook, state.params)

    def count_tokenizer(method, x):
        return _count(lambda p, x: tokenizer.apply({"params": p}, x, method=method), params, x)

    whole = trained = count_tokenizer(lambda module, x: module(x)[0], image)
    if is_decoder_alone:
        side, width = tokenizer.sides[-1], tokenizer.code_width
        trained = count_tokenizer("decode_raw", jax.ShapeDtypeStruct((1, side, side, width), jnp.float32))
    perceptual = discriminator = 0.0
    if has_perceptual:
        perceptual = _count(lambda p, x: lpips_loss(p, x, x), lpips_shapes(), image) / 2
    if adversary is not None:
        part = state.extra["adversary"]
        variables = {"params": part["params"], "spectral": part["spectral"]}
        if fixed.discriminator is not None:
            variables["frozen"] = fixed.discriminator
        discriminator = _count(adversary.network.apply, variables, image)
    return TokenizerFlops(whole, trained, perceptual, discriminator)
