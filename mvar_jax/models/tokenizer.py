"""The multi-scale residual VQ autoencoder (VAR section 3.2; docs/method.md, Tokenizer)."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.models.autoencoder import Decoder, Encoder, conv
from mvar_jax.models.init import LINEN_FIELDS
from mvar_jax.ops import quantize
from mvar_jax.ops.losses import commitment_loss
from mvar_jax.ops.pixels import MODES
from mvar_jax.ops.precision import EXACT, PRECISIONS, STANDARD, in_own_precision, precision_of
from mvar_jax.scales import areas_of, check_sides, extend_sides, shape_of
from mvar_jax.schema import Choice, Count, Layers, NotNegative, Share
from mvar_jax.sharding import constrain, named_axes
from mvar_jax.values import as_integers


def quantizer_params(params: dict) -> dict:
    """Return the weights that map token ids to f_hat: the codebook and phi, without encoder and decoder."""
    return {name: leaf for name, leaf in params.items() if name == "codebook" or name.startswith("phi_convs")}


DECODER_PARTS = ("decoder", "post_quant_conv")  # all other parameters decide on the ids


def ids_params(params: dict) -> dict:
    """Return the weights that token ids and f_hat depend on: encoder, quant convolution, codebook and phi."""
    return {name: leaf for name, leaf in params.items() if name not in DECODER_PARTS}


def decoder_params(params: dict) -> dict:
    """Return the other weights: those of the post-quant convolution and the decoder."""
    return {name: leaf for name, leaf in params.items() if name in DECODER_PARTS}


BASIS, MAP = "codebook_basis", "codebook_map"  # E and W of a codebook E W (SimVQ) in training


def factor_codebook(params: dict) -> dict:
    """Return initial weights whose codebook is E W: E is the ordinary initial codebook, fixed; W is the identity.

    Both are whole on every device, so that `fold_codebook` reads them in every process.
    """
    boxed = params["codebook"]
    whole = lambda x: boxed.replace(value=x, names=(None, None))
    parts = {BASIS: whole(boxed.value), MAP: whole(jnp.eye(boxed.value.shape[1]))}
    return {name: leaf for name, leaf in params.items() if name != "codebook"} | parts


def multiply_codebook(params: dict) -> dict:
    """Return weights with the codebook E W in place of its factors, inside a program; others as they are."""
    if MAP not in params:
        return params
    product = jnp.matmul(
        jax.lax.stop_gradient(params[BASIS]), params[MAP], precision=precision_of("quantizer", jnp.float32)
    )
    return _without_factors(params) | {"codebook": constrain(product, "vocab", "code")}


def fold_codebook(params: dict) -> dict:
    """Return weights with the codebook E W in place of its factors, computed on the host; others as they are.

    The product of float64 is rounded once, so that a run's evaluation and every platform that loads its weights have
    the same codes.
    """
    if MAP not in params:
        return params
    product = np.asarray(params[BASIS], np.float64) @ np.asarray(params[MAP], np.float64)
    return _without_factors(params) | {"codebook": product.astype(np.float32)}


def _without_factors(params: dict) -> dict:
    return {name: leaf for name, leaf in params.items() if name not in (BASIS, MAP)}


class Tokenizer(nn.Module):
    """Multi-scale residual VQ autoencoder: images to pyramids of token ids and back.

    Attributes:
      sides: side of each token map, strictly increasing; the image side is the last times 2^(len(ch_mult) - 1).
      vocab_size: number of codes; token caches hold 2 bytes a token for up to 65,536, else 4.
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
      dtype: computation of the encoder and decoder; the quantizer is always float32, the decoder too if exact.
      precision: of float32 products on accelerators: standard (exact if listed in ops/precision.py) or exact (all).
      remat: recompute the inside of residual and attention blocks in the backward pass, to save memory.
      channels: of the images: 1 (grey), 3 (RGB) or 4 (RGBA).
    """

    sides: tuple[int, ...]
    vocab_size: Count = 4096
    code_width: Count = 32
    ch: Count = 160
    ch_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Layers = 2
    num_groups: Count | None = 32
    group_size: Count | None = None
    num_phi: int = 4
    phi_ratio: Share = 0.5
    znorm: bool = False
    beta: NotNegative = 0.25
    dtype: Any = jnp.float32
    precision: Annotated[str, Choice(PRECISIONS)] = dataclasses.field(default=STANDARD, metadata=FREE)
    remat: bool = dataclasses.field(default=False, metadata=FREE)
    channels: Count = 3

    def setup(self):
        norm = {"num_groups": self.num_groups, "group_size": self.group_size, "dtype": self.dtype}
        sizes = (self.ch, tuple(self.ch_mult), self.num_res_blocks)
        self.encoder = Encoder(*sizes, self.code_width, norm, self.dtype, self.remat)
        dtype = self.decoder_dtype
        if dtype == jnp.float16:  # SiLU too before rounding, which halves the error
            norm |= {"dtype": jnp.float32, "one_pass": True}
        self.decoder = Decoder(*sizes, norm, dtype, self.remat, self.channels)
        self.quant_conv = conv(self.code_width, 3, self.dtype, part="quantizer")
        self.post_quant_conv = conv(self.code_width, 3, jnp.float32, part="quantizer")
        self.phi_convs = [conv(self.code_width, 3, jnp.float32, part="quantizer") for _ in range(self.num_phi)]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        self.codebook = self.param("codebook", named_axes(init, "vocab", "code"), (self.vocab_size, self.code_width))

    @property
    def decoder_dtype(self) -> Any:
        """Return the dtype of the decoder's computation."""
        return jnp.float32 if self.precision == EXACT else self.dtype

    @property
    def num_stages(self) -> int:
        """Return the number of the decoder's stages, one for each level."""
        return len(self.ch_mult)

    def stage_bytes(self, stage: int) -> int:
        """Return the bytes of the largest map in one of the decoder's stages, for one image."""
        level = self.num_stages - 1 - stage
        width = self.ch * max(self.ch_mult[level : level + 2])  # the upsampled map is as wide as the coarser level
        return areas_of(self.sides)[-1] * 4**stage * width * jnp.dtype(self.decoder_dtype).itemsize

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        return self.sides[-1] * self.downsampling

    def for_images(self, height: int, width: int, sides: tuple[int, ...] | None = None) -> "Tokenizer":
        """Return the tokenizer of images of another size, for the same weights; it cannot be trained.

        If they are not square, its `sides` are (height, width) of each map: a side counts along the images' shorter
        edge, and the other edge follows their shape.

        Args:
          height, width: of the images, multiples of `downsampling`.
          sides: along the shorter edge; None: the tokenizer's own, cut or extended as in 16, 24, 32, 48, 64.

        Raises InputError if the images have no such size, or the sides do not end at their shorter edge.
        """
        for name, size in (("height", height), ("width", width)):
            if size < self.downsampling or size % self.downsampling:
                expected = f"a multiple of {self.downsampling} pixels, by which the tokenizer reduces images"
                words = f"{name} must be {expected}, got {size}"
                raise InputError(words, field=name, given=size, expected=expected)
        rows, columns = height // self.downsampling, width // self.downsampling
        short = min(rows, columns)
        if sides is None:
            sides = extend_sides([min(shape_of(side)) for side in self.sides], short)
        else:
            sides = as_integers(sides, "sides")
        check_sides(sides)
        if sides[-1] != short:
            expected = f"a list that ends at {short}, the shorter edge of {height} x {width} images"
            raise InputError(f"sides must be {expected}, got {sides}", field="sides", given=sides, expected=expected)
        if rows == columns:
            return self.clone(sides=sides)
        along = lambda side, edge: max(1, round(side * edge / short))
        return self.clone(sides=tuple((along(side, rows), along(side, columns)) for side in sides))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Return (height, width) of the images."""
        rows, columns = shape_of(self.sides[-1])
        return rows * self.downsampling, columns * self.downsampling

    def check(self, image_size: int | None = None) -> None:
        """Raise InputError if the fields contradict each other or the side of the images."""
        check_fields(self, "", hidden=LINEN_FIELDS)
        check_sides(self.sides)
        size, S = image_size or self.image_size, len(self.sides)
        has_one = (self.num_groups is None) != (self.group_size is None)
        latent = f"{size / self.downsampling:g}, that is image_size={size} / {self.downsampling}"
        widths = [self.ch * mult for mult in self.ch_mult]
        norm = "num_groups" if self.group_size is None else "group_size"
        divisor = f"a divisor of the channels of every level, {', '.join(map(str, widths))}"
        rules = (
            ("ch_mult", bool(widths), "a tuple of one number for each level"),
            ("num_groups", has_one, f"set if and only if group_size={self.group_size} is None"),
            (norm, not has_one or all(width % getattr(self, norm) == 0 for width in widths), divisor),
            ("channels", self.channels in MODES, "1 (grey), 3 (RGB) or 4 (RGBA)"),
            ("num_phi", 1 <= self.num_phi <= S, f"from 1 to {S}, the number of scales"),
            ("sides", size == self.image_size, f"a list with a last side of {latent}"),
        )
        for field, is_valid, expected in rules:
            if not is_valid:
                given = getattr(self, field)
                message = f"{field} must be {expected}, got {given}"
                raise InputError(message, field=field, given=given, expected=expected)

    def init_params(self, key: jax.Array):
        """Return the parameter tree, each leaf boxed with its logical axes. Call under jit or eval_shape."""
        return self.init(key, jnp.zeros((1, self.image_size, self.image_size, self.channels)))["params"]

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

    @in_own_precision
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

    @in_own_precision
    def decode_stages(self, x_BYXC: jax.Array, stages: range) -> jax.Array:
        """Return what some of the decoder's stages make of a map: at the end the image, not clipped."""
        x = self.post_quant_conv(x_BYXC) if 0 in stages else x_BYXC
        x = self.decoder(x, stages)
        return x.astype(jnp.float32) if stages.stop == self.num_stages else x

    def decode_raw(self, f_hat_BYXc: jax.Array) -> jax.Array:
        """Return the image of a latent map, not clipped, as the training losses need it."""
        return self.decode_stages(f_hat_BYXc, range(self.num_stages))

    def decode(self, f_hat_BYXc: jax.Array) -> jax.Array:
        """Return the image of a latent map, float32 in [-1, 1]."""
        return jnp.clip(self.decode_raw(f_hat_BYXc), -1, 1)

    def assignment_entropy(self, rests: tuple[jax.Array, ...], tokens_Bm: jax.Array, temperature: float) -> jax.Array:
        """Return `ops.quantize.assignment_entropy` of some tokens of each row. rests: of `Encoded`."""
        picked_Bmc = jnp.take_along_axis(jnp.concatenate(rests, axis=1), tokens_Bm[..., None], axis=1)
        picked_Nc = picked_Bmc.reshape(-1, self.code_width)
        return quantize.assignment_entropy(picked_Nc, self.codebook, temperature, self.znorm)

    def __call__(
        self, images_BYX3: jax.Array, use_codes: jax.Array | bool = True, num_scales_B: jax.Array | None = None
    ):
        """Return (reconstruction not clipped, quantizer loss, Encoded), the forward pass of training.

        The gradient of the reconstruction reaches f only (straight-through). If use_codes is False, the decoder gets
        f itself and the quantizer loss is 0: the unquantised warm-up of a small tokenizer.

        num_scales_B: first scales that each row keeps: the decoder gets their f_hat, and the quantizer loss is the
        mean over them. None keeps all. `Encoded` always has all scales.
        """
        f = self.features(images_BYX3)
        encoded = self.quantize(f)
        loss = commitment_loss(f, encoded.f_hats, self.beta, num_scales_B)
        f_hat = encoded.f_hats[-1] if num_scales_B is None else quantize.pick_f_hat(encoded.f_hats, num_scales_B)
        straight = jax.lax.stop_gradient(f_hat - f) + f
        use = jnp.asarray(use_codes, bool)
        return self.decode_raw(jnp.where(use, straight, f)), jnp.where(use, loss, 0.0), encoded
