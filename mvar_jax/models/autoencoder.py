"""Encoder and decoder of the tokenizer (docs/method.md, Tokenizer; VAR section 3.2). Images are NHWC in [-1, 1]."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.ops.convolution import convolve
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.precision import precision_of
from mvar_jax.sharding import constrain, named_axes

LAST_FEATURES = "last_features"  # collection that gets the input of the decoder's last convolution, if it is mutable
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
        conv_general_dilated=convolve,
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
        rows = merge(kernel.astype(jnp.float32))  # for even (0) and odd (1) rows of the large map, then its columns
        kernels = [k.swapaxes(0, 1).astype(self.dtype) for row in rows for k in merge(row.swapaxes(0, 1))]

        apply = lambda kernel, *padding: convolve(x_BYXC.astype(self.dtype), kernel, (1, 1), padding)

        places = ((0, 0), (0, 1), (1, 0), (1, 1))
        if current_platform() == "cpu":  # one convolution would take longer there
            parts = [apply(k, (1 - i, i), (1 - j, j)) for k, (i, j) in zip(kernels, places, strict=True)]
        else:  # one convolution, padded on all sides: odd rows and columns begin one later
            y = apply(jnp.stack(kernels, axis=3).reshape(2, 2, C, -1), (1, 1), (1, 1))
            y = y.reshape(B, Y + 1, X + 1, 4, self.features)
            parts = [y[:, i : i + Y, j : j + X, n] for n, (i, j) in enumerate(places)]
        rows = [jnp.stack(parts[:2], axis=3), jnp.stack(parts[2:], axis=3)]
        return jnp.stack(rows, axis=2).reshape(B, 2 * Y, 2 * X, self.features) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation in float32, eps 1e-6; groups are given by their number or by their size.

    Computes the moments of each channel over space, then averages them over the group's channels: reshaping the
    whole map, as flax's module does, takes several times as long on a CPU.

    one_pass: read the map once for both moments, as differences from its first pixel, so that little cancels.
    """

    num_groups: int | None
    group_size: int | None
    dtype: Any
    one_pass: bool = False

    @nn.compact
    def __call__(self, x_BYXC):
        C = x_BYXC.shape[-1]
        size = self.group_size or C // self.num_groups
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        def group_mean(mean_BC):
            mean_BG = mean_BC.reshape(-1, C // size, size).mean(axis=-1)
            return jnp.repeat(mean_BG, size, axis=-1)[:, None, None]

        over_space = functools.partial(jnp.mean, axis=(1, 2))
        x = x_BYXC.astype(jnp.float32)
        if self.one_pass:
            shift = x[:, :1, :1]
            mean_BC, square_BC = over_space(x - shift), over_space(jnp.square(x - shift))
            mean = group_mean(mean_BC + shift[:, 0, 0])
            spread_BC = jnp.square(mean_BC + shift[:, 0, 0] - mean[:, 0, 0])  # of the channels' means
            variance = group_mean(square_BC - jnp.square(mean_BC) + spread_BC)
            x = x - mean
        else:
            x = x - group_mean(over_space(x))
            variance = group_mean(over_space(jnp.square(x)))
        x = x * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias
        return x.astype(self.dtype)


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, 3x3 conv) twice, with a 1x1 shortcut if widths differ."""

    features: int
    norm: dict
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXC):
        y = conv(self.features, 3, self.dtype, "conv1")(nn.silu(GroupNorm(**self.norm, name="norm1")(x_BYXC)))
        y = constrain(y, "batch", None, None, None)
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
        y = conv(C, 1, self.dtype, "proj")(y.reshape(B, Y, X, C))
        return constrain(x_BYXC + y, "batch", None, None, None)


def blocks(remat: bool) -> tuple[type[nn.Module], type[nn.Module]]:
    """Return the classes of residual and attention blocks.

    remat: the backward pass recomputes what is inside them.
    """
    return tuple(map(nn.remat, (ResidualBlock, AttentionBlock))) if remat else (ResidualBlock, AttentionBlock)


class Encoder(nn.Module):
    """Image `[B, Y, X, C]` -> latent map `[B, y, x, c]`, with attention in the last level and the middle."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    code_width: int
    norm: dict
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dtype, last = self.dtype, len(self.ch_mult) - 1
        residual, attention = blocks(self.remat)
        x = conv(self.ch, 3, dtype, "conv_in")(x)
        for level, mult in enumerate(self.ch_mult):
            for block in range(self.num_res_blocks):
                x = residual(self.ch * mult, self.norm, dtype, name=f"level{level}_block{block}")(x)
                if level == last:
                    x = attention(self.norm, dtype, name=f"level{level}_attention{block}")(x)
            if level != last:
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # bottom and right only
                x = conv(x.shape[-1], 3, dtype, f"level{level}_down", stride=2)(x)
        x = middle(x, self.norm, dtype, self.remat)
        x = nn.silu(GroupNorm(**self.norm, name="norm_out")(x))
        return conv(self.code_width, 3, dtype, "conv_out", part="quantizer")(x)


class Decoder(nn.Module):
    """Latent map `[B, y, x, c]` -> image `[B, Y, X, channels]`, not clipped.

    Its stages are the levels, coarse to fine, each from the map of the stage before it.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    norm: dict
    dtype: Any
    remat: bool = False
    channels: int = 3

    @nn.compact
    def __call__(self, x, stages: range):
        dtype, last = self.dtype, len(self.ch_mult) - 1
        residual, attention = blocks(self.remat)
        for stage in stages:
            level = last - stage
            features = self.ch * self.ch_mult[level]
            if level == last:
                x = middle(conv(features, 3, dtype, "conv_in")(x), self.norm, dtype, self.remat)
            else:
                x = UpConv(x.shape[-1], dtype, name=f"level{level + 1}_up")(x)
            for block in range(self.num_res_blocks + 1):
                x = residual(features, self.norm, dtype, name=f"level{level}_block{block}")(x)
                if level == last:
                    x = attention(self.norm, dtype, name=f"level{level}_attention{block}")(x)
            if level == 0:
                x = nn.silu(GroupNorm(**self.norm, name="norm_out")(x))
                self.sow(LAST_FEATURES, "x", x)
                x = conv(self.channels, 3, dtype, "conv_out")(x)
        return x


def middle(x, norm, dtype, remat: bool):
    """Apply residual, attention and residual blocks at the coarsest resolution; call inside a compact method."""
    residual, attention = blocks(remat)
    x = residual(x.shape[-1], norm, dtype, name="middle_block1")(x)
    x = attention(norm, dtype, name="middle_attention")(x)
    return residual(x.shape[-1], norm, dtype, name="middle_block2")(x)
