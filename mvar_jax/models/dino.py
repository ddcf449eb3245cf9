"""A discriminator on the features of a frozen DINO ViT-S/16 (Caron et al., arXiv 2104.14294), as in StyleGAN-T.

The network sees images of 224 x 224 pixels. Its patches after the embedding and after four blocks, each plus the
class token, go to a head of their own: convolutions along the row of patches, with spectral normalisation (Sauer et
al., arXiv 2301.09515). Gradients pass through the frozen weights to the image.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.models.autoencoder import CONV_INIT, GroupNorm
from mvar_jax.models.discriminator import MAX_GROUPS, SLOPE, check_side
from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.resize import resize_area, resize_bicubic
from mvar_jax.sharding import constrain, named_axes

SIDE, PATCH, GRID = 224, 16, 14  # pixels of an image and of a patch; patches along a side
DEPTH, WIDTH, NUM_HEADS, HIDDEN = 12, 384, 6, 1536
READ_EVERY = 3  # blocks; features are read after blocks 2, 5, 8 and 11
NORM_EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_KERNEL = 9  # patches
SPECTRAL_EPS = 1e-12

# parameter -> shape of one block's, all blocks stacked in front
BLOCK_SHAPES = {
    "norm1/scale": (WIDTH,),
    "norm1/bias": (WIDTH,),
    "qkv/kernel": (WIDTH, 3 * WIDTH),
    "qkv/bias": (3 * WIDTH,),
    "proj/kernel": (WIDTH, WIDTH),
    "proj/bias": (WIDTH,),
    "norm2/scale": (WIDTH,),
    "norm2/bias": (WIDTH,),
    "up/kernel": (WIDTH, HIDDEN),
    "up/bias": (HIDDEN,),
    "down/kernel": (HIDDEN, WIDTH),
    "down/bias": (WIDTH,),
}
SHAPES = {
    "class_token": (WIDTH,),
    "positions": (1 + GRID**2, WIDTH),
    "embed/kernel": (PATCH, PATCH, 3, WIDTH),
    "embed/bias": (WIDTH,),
    **{f"blocks/{name}": (DEPTH, *shape) for name, shape in BLOCK_SHAPES.items()},
}


@functools.cache
def shapes() -> dict:
    """Return the frozen network's weights, the collection "frozen", as shapes by name."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def dino_features(weights: dict, images_BYX3: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Return the features of five depths, `[5, B, 196, 384] float32`.

    Args:
      weights: by the names of SHAPES.
      images_BYX3: `[B, 224, 224, 3] float32` in [-1, 1].
      dtype: of the blocks' products; sums, norms and softmax are float32.
    """
    precision = precision_of("discriminator", dtype)
    cast = lambda name: weights[name].astype(dtype)
    x = ((images_BYX3 + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(STD)
    x = jax.lax.conv_general_dilated(
        x.astype(dtype),
        cast("embed/kernel"),
        (PATCH, PATCH),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    x = x.reshape(len(x), GRID**2, WIDTH).astype(jnp.float32) + weights["embed/bias"]
    first = jnp.broadcast_to(weights["class_token"], (len(x), 1, WIDTH))
    x = jnp.concatenate([first, x], axis=1) + weights["positions"]
    blocks = {
        name: weights[f"blocks/{name}"].reshape(DEPTH // READ_EVERY, READ_EVERY, *shape)
        for name, shape in BLOCK_SHAPES.items()
    }

    def run(x, group):
        for i in range(READ_EVERY):
            x = _block({name: w[i] for name, w in group.items()}, x, dtype, precision)
        return x, x[:, 1:] + x[:, :1]

    _, later = jax.lax.scan(run, x, blocks)
    return jnp.concatenate([(x[:, 1:] + x[:, :1])[None], later])


def _block(weights: dict, x_BNC: jax.Array, dtype: Any, precision: Any) -> jax.Array:
    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)
        return unit * weights[f"{name}/scale"] + weights[f"{name}/bias"]

    def linear(name, x):
        y = jnp.matmul(
            x.astype(dtype),
            weights[f"{name}/kernel"].astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return y + weights[f"{name}/bias"]

    B, N, C = x_BNC.shape
    qkv = linear("qkv", norm("norm1", x_BNC)).reshape(B, N, 3, NUM_HEADS, C // NUM_HEADS).astype(dtype)
    q, k, v = (qkv[:, :, i] for i in range(3))
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(product("bnhd,bmhd->bhnm", q, k) * (C // NUM_HEADS) ** -0.5, axis=-1)
    y = product("bhnm,bmhd->bnhd", share.astype(dtype), v).reshape(B, N, C)
    x = x_BNC + linear("proj", y)
    return x + linear("down", jax.nn.gelu(linear("up", norm("norm2", x)), approximate=False))


class SpectralConv(nn.Module):
    """A convolution along the row, wrapped around its ends, with its kernel divided by its largest singular value.

    One power iteration with the vector u of the collection "spectral"; u moves if that collection is mutable. Without
    moving it the estimate is norm(kernel u), so it needs no second vector.
    """

    features: int
    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BNC):
        C, u_init = x_BNC.shape[-1], nn.initializers.normal(1.0)
        init = named_axes(CONV_INIT, "space", "channels_in", "channels_out")
        kernel = self.param("kernel", init, (self.size, C, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        u = self.variable("spectral", "u", lambda: _unit(u_init(self.make_rng("params"), (self.features,))))
        kernel = kernel / self._largest_singular_value(kernel.reshape(-1, self.features), u)
        half = self.size // 2
        y = jax.lax.conv_general_dilated(
            jnp.pad(x_BNC.astype(self.dtype), ((0, 0), (half, half), (0, 0)), mode="wrap"),
            kernel.astype(self.dtype),
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=precision_of("discriminator", self.dtype),
        )
        return y + bias.astype(self.dtype)

    def _largest_singular_value(self, matrix, u):
        stopped, multiply = jax.lax.stop_gradient(matrix), functools.partial(jnp.matmul, precision="highest")
        v = _unit(multiply(stopped, u.value))
        if self.is_mutable_collection("spectral") and not self.is_initializing():
            u.value = _unit(multiply(v, stopped))
        return multiply(multiply(jax.lax.stop_gradient(v), matrix), jax.lax.stop_gradient(u.value))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), SPECTRAL_EPS)


class Head(nn.Module):
    """Features of one depth `[B, N, C]` -> logits `[B, N]`."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BNC):
        x = self._layer(1, "in")(x_BNC)
        x = (self._layer(HEAD_KERNEL, "middle")(x) + x) / np.sqrt(2).astype(x.dtype)
        return SpectralConv(1, 1, self.dtype, name="conv_out")(x)[..., 0]

    def _layer(self, size: int, name: str):
        conv = SpectralConv(WIDTH, size, self.dtype, name=f"conv_{name}")
        norm = GroupNorm(MAX_GROUPS, None, self.dtype, name=f"norm_{name}")
        return lambda x: nn.leaky_relu(norm(conv(x)[:, :, None])[:, :, 0], SLOPE)


class DinoDiscriminator(nn.Module):
    """Five heads on frozen features. Images of another size are resized: averaged if larger, bicubic if smaller.

    Group normalisation instead of the published statistics of eight samples, for the reasons of `PatchDiscriminator`.
    The collection "frozen" holds the weights of `shapes`, under the name "vit".

    dtype: of the computation; logits are float32.
    """

    dtype: Any = jnp.float32

    crop_side = SIDE
    min_side = PATCH

    @nn.compact
    def __call__(self, images_BYX3: jax.Array) -> jax.Array:
        """Return logits, `[B, 5 * 196] float32`. Images as for `PatchDiscriminator`, with three channels."""
        zeros = lambda: {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        weights = jax.lax.stop_gradient(self.variable("frozen", "vit", zeros).value)
        is_large = min(images_BYX3.shape[1:3]) > SIDE
        x = (resize_area if is_large else resize_bicubic)(images_BYX3, SIDE)
        features = dino_features(weights, constrain(x, "batch", None, None, None), self.dtype)
        logits = [Head(self.dtype, name=f"head{i}")(x) for i, x in enumerate(features)]
        return jnp.concatenate(logits, axis=1).astype(jnp.float32)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError if images `[Y, X, C]` are too small or have not three channels."""
        check_side(self.min_side, image_shape, "use the patch discriminator")
        if image_shape[2] != 3:
            message = f"images must have 3 channels for DINO, got {image_shape[2]}; use the patch discriminator"
            raise InputError(message, field="images", given=image_shape, expected="3 channels")

    def init_variables(self, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
        """Return {"params": ..., "spectral": ...}, each parameter boxed; as `PatchDiscriminator.init_variables`."""
        self.check(image_shape)
        variables = self.init(key, jnp.zeros((1, *image_shape)))
        return {name: variables[name] for name in ("params", "spectral")}

    def mesh_sizes(self) -> dict[str, tuple[str, int]]:
        """Return config key -> (logical axis, size) of the dimensions that a mesh cuts and must divide."""
        axes = {"in": "channels_in", "out": "channels_out"}
        return {f"discriminator width ({end})": (axis, WIDTH) for end, axis in axes.items()}
