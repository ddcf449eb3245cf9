"""The multi-scale residual VQ autoencoder (VAR section 3.2; docs/method.md, Tokenizer)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.ops import quantize
from mvar_jax.ops.losses import commitment_loss
from mvar_jax.scales import check_sides
from mvar_jax.sharding import constrain, named_axes

CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(features: int, size: int, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    """Return a square convolution; stride 1 keeps the side, stride 2 expects a padded map."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2 if stride == 1 else 0,
        dtype=dtype,
        kernel_init=named_axes(CONV_INIT, "space", None, "channels_in", "channels_out"),
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
        return conv(self.code_width, 3, dtype, "conv_out")(x)


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


def quantizer_params(params: dict) -> dict:
    """Return the weights that map token ids to f_hat: the codebook and phi, without encoder and decoder."""
    return {name: leaf for name, leaf in params.items() if name == "codebook" or name.startswith("phi_convs")}


class Tokenizer(nn.Module):
    """Multi-scale residual VQ autoencoder: images to pyramids of token ids and back.

    Attributes:
      sides: side of each token map, strictly increasing; the image side is the last times 2^(len(ch_mult) - 1).
      vocab_size: number of codes.
      code_width: width of a code.
      ch: channels of the first level of the encoder and decoder.
      ch_mult: channels of each level, as multiples of ch; between levels the map halves.
      num_res_blocks: residual blocks a level (the decoder has one more).
      num_groups: groups of the group normalisation; None if group_size is given.
      group_size: channels a group, instead of num_groups.
      num_phi: residual convolutions shared by the scales: 1, a few, or one for each scale.
      phi_ratio: share of the convolution in phi(x) = (1 - r) x + r conv(x).
      znorm: search the nearest code on the unit sphere.
      beta: weight of the commitment loss.
      dtype: computation of the encoder and decoder; the quantizer is always float32.
    """

    sides: tuple[int, ...]
    vocab_size: int = 4096
    code_width: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int | None = 32
    group_size: int | None = None
    num_phi: int = 4
    phi_ratio: float = 0.5
    znorm: bool = False
    beta: float = 0.25
    dtype: Any = jnp.float32

    def setup(self):
        norm = {"num_groups": self.num_groups, "group_size": self.group_size, "dtype": self.dtype}
        sizes = (self.ch, tuple(self.ch_mult), self.num_res_blocks)
        self.encoder = Encoder(*sizes, self.code_width, norm, self.dtype)
        self.decoder = Decoder(*sizes, norm, self.dtype)
        self.quant_conv = conv(self.code_width, 3, self.dtype, None)
        self.post_quant_conv = conv(self.code_width, 3, self.dtype, None)
        self.phi_convs = [conv(self.code_width, 3, jnp.float32, None) for _ in range(self.num_phi)]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        self.codebook = self.param("codebook", named_axes(init, "vocab", "code"), (self.vocab_size, self.code_width))

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        return self.sides[-1] * self.downsampling

    def check(self, image_size: int | None = None) -> None:
        """Raise InputError if the fields contradict each other or the side of the images."""
        check_sides(self.sides)
        size, S = image_size or self.image_size, len(self.sides)
        has_one = (self.num_groups is None) != (self.group_size is None)
        latent = f"{size / self.downsampling:g}, that is image_size={size} / {self.downsampling}"
        rules = {
            "num_groups": (has_one, f"set if and only if group_size={self.group_size} is None"),
            "num_phi": (1 <= self.num_phi <= S, f"from 1 to {S}, the number of scales"),
            "sides": (size == self.image_size, f"a list with a last side of {latent}"),
        }
        for field, (is_valid, expected) in rules.items():
            if not is_valid:
                given = getattr(self, field)
                message = f"{field} must be {expected}, got {given}"
                raise InputError(message, field=field, given=given, expected=expected)

    def init_params(self, key: jax.Array):
        """Return the parameter tree, each leaf boxed with its logical axes. Call under jit or eval_shape."""
        return self.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))["params"]

    def mesh_sizes(self) -> dict[str, tuple[str, int]]:
        """Return config key -> (logical axis, size) of the dimensions that a mesh cuts and must divide."""
        widths = {f"ch * {mult}": self.ch * mult for mult in self.ch_mult}
        named = {f"{key} (in)": ("channels_in", size) for key, size in widths.items()}
        named |= {f"{key} (out)": ("channels_out", size) for key, size in widths.items()}
        return {**named, "vocab_size": ("vocab", self.vocab_size)}

    def phi(self, scale: int, x_BYXc: jax.Array) -> jax.Array:
        """Return (1 - r) x + r conv3x3(x), with the convolution assigned to this scale."""
        index = quantize.phi_index(len(self.sides), self.num_phi)[scale]
        return (1 - self.phi_ratio) * x_BYXc + self.phi_ratio * self.phi_convs[index](x_BYXc)

    def features(self, images_BYX3: jax.Array) -> jax.Array:
        """Return the latent map f, `[B, y, x, c] float32`."""
        return self.quant_conv(self.encoder(images_BYX3)).astype(jnp.float32)

    def quantize(self, f_BYXc: jax.Array) -> quantize.Encoded:
        """Return token ids and f_hat after each scale; see `ops.quantize.encode_residual`."""
        return quantize.encode_residual(f_BYXc, self.codebook, self.phi, self.sides, self.znorm)

    def encode(self, images_BYX3: jax.Array) -> jax.Array:
        """Return token ids, `[B, L] int32`."""
        return self.quantize(self.features(images_BYX3)).ids_BL

    def f_hats(self, ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """Return f_hat after each scale, from ids alone."""
        return quantize.decode_ids(ids_BL, self.codebook, self.phi, self.sides)

    def teacher_forcing(self, ids_BL: jax.Array) -> jax.Array:
        """Return the transformer's input for all tokens but those of scale 0, `[B, L - n_0, c] float32`."""
        return quantize.teacher_forcing_input(self.f_hats(ids_BL), self.sides)

    def add_codes(self, f_hat_BYXc: jax.Array, codes_Bnc: jax.Array, scale: int) -> jax.Array:
        """Return f_hat with the codewords of one more scale added."""
        return f_hat_BYXc + quantize.upsample_codes(codes_Bnc, scale, self.sides, self.phi)

    def decode_raw(self, f_hat_BYXc: jax.Array) -> jax.Array:
        """Return the image of a latent map, not clipped, as the training losses need it."""
        return self.decoder(self.post_quant_conv(f_hat_BYXc)).astype(jnp.float32)

    def decode(self, f_hat_BYXc: jax.Array) -> jax.Array:
        """Return the image of a latent map, float32 in [-1, 1]."""
        return jnp.clip(self.decode_raw(f_hat_BYXc), -1, 1)

    def __call__(self, images_BYX3: jax.Array, use_codes: jax.Array | bool = True):
        """Return (reconstruction not clipped, quantizer loss, Encoded), the forward pass of training.

        The gradient of the reconstruction reaches f only (straight-through). If use_codes is False, the decoder gets
        f itself and the quantizer loss is 0: the unquantised warm-up of a small tokenizer.
        """
        f = self.features(images_BYX3)
        encoded = self.quantize(f)
        loss = commitment_loss(f, encoded.f_hats, self.beta)
        straight = jax.lax.stop_gradient(encoded.f_hats[-1] - f) + f
        use = jnp.asarray(use_codes, bool)
        return self.decode_raw(jnp.where(use, straight, f)), jnp.where(use, loss, 0.0), encoded
