"""Encoder and decoder of the tokenizer (docs/method.md, Tokenizer; VAR section 3.2). Images are NHWC in [-1, 1]."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.ops.precision import precision_of
from mvar_jax.sharding import constrain, named_axes

CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
    features: int, size: int, dtype: Any, name: str | None = None, stride: int = 1, part: str = "autoencoder"
) -> nn.Conv:
    """Return a square convolution; stride 1 keeps the side, stride 2 expects a padded map.

    part: see `precision.TABLE`.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2 if stride == 1 else 0,
        dtype=dtype,
        kernel_init=named_axes(CONV_INIT, "space", None, "channels_in", "channels_out"),
        precision=precision_of(part, dtype),
        name=name,
    )


class UpConv(nn.Module):
    """Nearest x2 upsampling and a 3x3 convolution, as four 2x2 convolutions of the small map: 4/9 of the work.

    Three neighbouring large pixels cover only two small ones per axis, so kernel taps that meet the same one add up.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXC):
        B, Y, X, C = x_BYXC.shape
        init = named_axes(CONV_INIT, "space", None, "channels_in", "channels_out")
        kernel = self.param("kernel", init, (3, 3, C, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        merge = lambda k: (jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]]))

        def convolve(kernel, i, j):
            """Return the pixels of the even (0) or odd (1) rows i and columns j."""
            return jax.lax.conv_general_dilated(
                x_BYXC.astype(self.dtype),
                kernel.astype(self.dtype),
                (1, 1),
                ((1 - i, i), (1 - j, j)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        rows = [
            jnp.stack([convolve(k.swapaxes(0, 1), i, j) for j, k in enumerate(merge(row.swapaxes(0, 1)))], axis=3)
            for i, row in enumerate(merge(kernel))
        ]
        y = jnp.stack(rows, axis=2).reshape(B, 2 * Y, 2 * X, self.features)
        return y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation in float32, eps 1e-6; groups are given by their number or by their size.

    Computes the moments of each channel over space, then averages them over the group's channels: reshaping the
    whole map, as flax's module does, takes several times as long on a CPU.
    """

    num_groups: int | None
    group_size: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXC):
        C = x_BYXC.shape[-1]
        size = self.group_size or C // self.num_groups
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        def group_mean(y_BYXC):
            mean_BG = jnp.mean(y_BYXC, axis=(1, 2)).reshape(-1, C // size, size).mean(axis=-1)
            return jnp.repeat(mean_BG, size, axis=-1)[:, None, None]

        x = x_BYXC.astype(jnp.float32)
        x = x - group_mean(x)
        x = x * (jax.lax.rsqrt(group_mean(jnp.square(x)) + 1e-6) * scale) + bias
        return x.astype(self.dtype)


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, 3x3 conv) twice, with a 1x1 shortcut if widths differ."""

    features: int
    norm: dict
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXC):
        y = conv(self.features, 3, self.dtype, "conv1")(nn.silu(GroupNorm(**self.norm, name="norm1")(x_BYXC)))
        y = conv(self.features, 3, self.dtype, "conv2")(nn.silu(GroupNorm(**self.norm, name="norm2")(y)))
        if x_BYXC.shape[-1] != self.features:
            x_BYXC = conv(self.features, 1, self.dtype, "shortcut")(x_BYXC)
        return constrain(x_BYXC + y, "batch", None, None, None)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, softmax in float32, residual."""

    norm: dict
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXC):
        B, Y, X, C = x_BYXC.shape
        y = GroupNorm(**self.norm, name="norm")(x_BYXC)
        q, k, v = jnp.split(conv(3 * C, 1, self.dtype, "qkv")(y).reshape(B, Y * X, 3 * C), 3, axis=-1)
        logits = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32) * C**-0.5
        y = jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(logits, axis=-1).astype(self.dtype), v)
        return x_BYXC + conv(C, 1, self.dtype, "proj")(y.reshape(B, Y, X, C))


class Encoder(nn.Module):
    """Image `[B, Y, X, 3]` -> latent map `[B, y, x, c]`, with attention in the last level and the middle."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    code_width: int
    norm: dict
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dtype, last = self.dtype, len(self.ch_mult) - 1
        x = conv(self.ch, 3, dtype, "conv_in")(x)
        for level, mult in enumerate(self.ch_mult):
            for block in range(self.num_res_blocks):
                x = ResidualBlock(self.ch * mult, self.norm, dtype, name=f"level{level}_block{block}")(x)
                if level == last:
                    x = AttentionBlock(self.norm, dtype, name=f"level{level}_attention{block}")(x)
            if level != last:
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # bottom and right only
                x = conv(x.shape[-1], 3, dtype, f"level{level}_down", stride=2)(x)
        x = middle(x, self.norm, dtype)
        x = nn.silu(GroupNorm(**self.norm, name="norm_out")(x))
        return conv(self.code_width, 3, dtype, "conv_out", part="quantizer")(x)


class Decoder(nn.Module):
    """Latent map `[B, y, x, c]` -> image `[B, Y, X, 3]`, not clipped."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    norm: dict
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dtype, last = self.dtype, len(self.ch_mult) - 1
        x = conv(self.ch * self.ch_mult[-1], 3, dtype, "conv_in")(x)
        x = middle(x, self.norm, dtype)
        for level in reversed(range(len(self.ch_mult))):
            features = self.ch * self.ch_mult[level]
            for block in range(self.num_res_blocks + 1):
                x = ResidualBlock(features, self.norm, dtype, name=f"level{level}_block{block}")(x)
                if level == last:
                    x = AttentionBlock(self.norm, dtype, name=f"level{level}_attention{block}")(x)
            if level:
                x = UpConv(features, dtype, name=f"level{level}_up")(x)
        x = nn.silu(GroupNorm(**self.norm, name="norm_out")(x))
        return conv(3, 3, dtype, "conv_out")(x)


def middle(x, norm, dtype):
    """Apply residual, attention and residual blocks at the coarsest resolution; call inside a compact method."""
    x = ResidualBlock(x.shape[-1], norm, dtype, name="middle_block1")(x)
    x = AttentionBlock(norm, dtype, name="middle_attention")(x)
    return ResidualBlock(x.shape[-1], norm, dtype, name="middle_block2")(x)
