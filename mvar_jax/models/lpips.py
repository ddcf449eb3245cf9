"""LPIPS v0.1 with VGG16 (Zhang et al., arXiv 1801.03924), in Flax: a perceptual distance of two images.

The convolutions are those of torchvision's VGG16, the heads those of the lpips package. True float32 on every device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.ops.pixels import repeat_grey
from mvar_jax.ops.precision import precision_of

# widths of each stage's convolutions, with their numbers in torchvision's file
STAGES = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
MIN_SIDE = 16  # of images, in pixels: the last of four halvings needs one


class Lpips(nn.Module):
    """The distances of pairs of images, [B] float32."""

    @nn.compact
    def __call__(self, a_BYX3: jax.Array, b_BYX3: jax.Array) -> jax.Array:
        """Return the distances of images `[B, Y, X, 3] float32` in [-1, 1], of 16 x 16 pixels or more."""
        precision = precision_of("losses", jnp.float32)
        pair = [(x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE) for x in (a_BYX3, b_BYX3)]
        total_B = jnp.zeros(len(a_BYX3))
        for i, (width, numbers) in enumerate(STAGES):
            if i > 0:
                pair = [nn.max_pool(x, (2, 2), (2, 2)) for x in pair]
            for number in numbers:
                layer = nn.Conv(width, (3, 3), precision=precision, name=f"conv{number}")
                pair = [nn.relu(layer(x)) for x in pair]  # apart, so that a constant image has no backward pass
            head_c = self.param(f"head{i}", nn.initializers.ones, (width,))
            a, b = (x / (_norm(x) + EPS) for x in pair)
            total_B += (jnp.square(a - b) * head_c).sum(-1).mean((1, 2))
        return total_B


def _norm(x_BYXC: jax.Array) -> jax.Array:
    """Return norms over channels, whose gradient is 0 instead of NaN if all are 0."""
    square = jnp.square(x_BYXC).sum(-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@functools.cache
def shapes() -> dict:
    """Return the network's parameter tree as shapes."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(Lpips().init, jax.random.key(0), images, images)["params"]


def lpips_loss(params: dict, reconstructions_BYXC: jax.Array, images_BYXC: jax.Array) -> jax.Array:
    """Return the mean distance over rows, for training: its gradient reaches the reconstructions alone.

    params: of `Lpips`, which are constants. Images as for `Lpips`, or grey ones of one channel.
    """
    stop = jax.lax.stop_gradient
    pair = repeat_grey(reconstructions_BYXC), repeat_grey(stop(images_BYXC))
    return Lpips().apply({"params": stop(params)}, *pair).mean()
