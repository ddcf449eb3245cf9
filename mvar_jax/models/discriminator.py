"""The patch discriminator of a tokenizer's adversarial loss (Isola et al., arXiv 1611.07004).

A discriminator maps images `[B, Y, X, C] float32` in [-1, 1] to logits `[B, N] float32`, N of them for an image. Its
variables are "params", which its optimizer trains; "spectral", vectors that move only if `apply` is called with
`mutable=["spectral"]`; and "frozen", weights that the caller passes. The patch discriminator has the first alone.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.models.autoencoder import GroupNorm
from mvar_jax.ops.convolution import convolve
from mvar_jax.ops.precision import precision_of
from mvar_jax.schema import Count, Layers
from mvar_jax.sharding import constrain, named_axes

SLOPE = 0.2  # of the leaky ReLU below 0
KERNEL = 4
MAX_GROUPS = 32
MAX_GROWTH = 8  # of the width, over its layers


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, each doubling the width, and two of stride 1: one logit for each overlapping patch.

    Group normalisation instead of the published batch normalisation: a sample's logits must not depend on the other
    samples, or they would change with the mesh and with accumulation, and real and fake batches would be told apart
    by their statistics.

    Attributes:
      layers: convolutions of stride 2; a patch is 70 pixels wide with 3, 34 with 2, 16 with 1.
      width: channels of the first.
      dtype: of the computation; logits are float32.
    """

    layers: Layers = 3
    width: Count = 64
    dtype: Any = jnp.float32

    crop_side = None  # images are taken as they are

    @property
    def min_side(self) -> int:
        """Return the least side of an image: with fewer pixels no logit is left."""
        return 3 * 2**self.layers

    @nn.compact
    def __call__(self, images_BYXC: jax.Array) -> jax.Array:
        """Return logits, `[B, N] float32`."""
        x = constrain(images_BYXC.astype(self.dtype), "batch", None, None, None)
        for i in range(self.layers + 1):
            x = self._conv(self._width_of(i), 2 if i < self.layers else 1, f"conv{i}")(x)
            if i > 0:
                x = GroupNorm(math.gcd(MAX_GROUPS, self.width), None, self.dtype, name=f"norm{i}")(x)
            x = constrain(nn.leaky_relu(x, SLOPE), "batch", None, None, None)
        x = self._conv(1, 1, "conv_out")(x)
        return x.reshape(len(x), -1).astype(jnp.float32)

    def _width_of(self, i: int) -> int:
        return self.width * min(2**i, MAX_GROWTH)

    def _conv(self, features: int, stride: int, name: str) -> nn.Conv:
        init = named_axes(nn.initializers.normal(0.02), "space", None, "channels_in", "channels_out")
        precision = precision_of("discriminator", self.dtype)
        return nn.Conv(
            features,
            (KERNEL, KERNEL),
            stride,
            1,
            dtype=self.dtype,
            kernel_init=init,
            precision=precision,
            conv_general_dilated=convolve,
            name=name,
        )

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError if images `[Y, X, C]` are too small."""
        check_side(self.min_side, image_shape, "take fewer discriminator layers")

    def init_variables(self, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
        """Return {"params": ..., "spectral": {}}, each parameter boxed with its logical axes.

        Call under jit or eval_shape. image_shape: (Y, X, C).
        """
        self.check(image_shape)
        return {"params": self.init(key, jnp.zeros((1, *image_shape)))["params"], "spectral": {}}

    def mesh_sizes(self) -> dict[str, tuple[str, int]]:
        """Return config key -> (logical axis, size) of the dimensions that a mesh cuts and must divide."""
        axes = {"in": "channels_in", "out": "channels_out"}
        return {f"discriminator width ({end})": (axis, self.width) for end, axis in axes.items()}


def check_side(min_side: int, image_shape: tuple[int, int, int], advice: str) -> None:
    """Raise InputError if a side of images `[Y, X, C]` is below `min_side`."""
    if min(image_shape[:2]) < min_side:
        expected = f"at least {min_side} x {min_side} pixels"
        given = f"{image_shape[0]} x {image_shape[1]}"
        message = f"images must have {expected} for the discriminator, got {given}; {advice}"
        raise InputError(message, field="images", given=image_shape, expected=expected)
