"""Multi-scale residual quantization: nearest code, encode, accumulate, teacher-forcing input (VAR algorithms 1, 2).

`phi(scale, x_BYXc)` is the blended convolution of a scale, passed as an argument so that these functions hold no
parameters. Everything is float32: small errors in codeword distances or f_hat change the ids, hence the image.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.precision import precision_of
from mvar_jax.ops.resize import resize_area, resize_bicubic
from mvar_jax.scales import Side, areas_of, offsets_of, shape_of

Phi = Callable[[int, jax.Array], jax.Array]


class Encoded(NamedTuple):
    """The result of `encode_residual`.

    Attributes:
      ids_BL: `[B, L] int32`.
      f_hats: f_hat after each scale, `[B, Y, X, c] float32`.
      rests: pooled residual that each scale quantizes, `[B, n_l, c] float32`; the latent map gets its gradient.
    """

    ids_BL: jax.Array
    f_hats: tuple[jax.Array, ...]
    rests: tuple[jax.Array, ...]


def nearest_code(x_Nc: jax.Array, codebook_Vc: jax.Array, znorm: bool = False) -> jax.Array:
    """Return the int32 ids of the nearest codewords by squared L2; with znorm both sides are L2-normalised first."""
    return jnp.argmin(_distances(x_Nc, codebook_Vc, znorm), axis=-1).astype(jnp.int32)


def _distances(x_Nc: jax.Array, codebook_Vc: jax.Array, znorm: bool) -> jax.Array:
    """Return squared distances to the codewords less |x|^2, which is the same for every code, `[N, V]`."""
    if znorm:
        x_Nc, codebook_Vc = _unit(x_Nc), _unit(codebook_Vc)
    dots_NV = jnp.einsum("...c,vc->...v", x_Nc, codebook_Vc, precision=precision_of("quantizer", x_Nc.dtype))
    squares = jnp.sum(jnp.square(codebook_Vc), -1)
    return squares - 2 * dots_NV


def assignment_entropy(x_Nc: jax.Array, codebook_Vc: jax.Array, temperature: float, znorm: bool = False) -> jax.Array:
    """Return the mean entropy of tokens' soft assignments less the entropy of their mean, in nats: a loss.

    It is least, -log V, if every token is sure of its code and all codes are chosen alike. A token's assignment is
    softmax(-distance / temperature), with the distances of `nearest_code`.
    """
    log_p_NV = jax.nn.log_softmax(-_distances(x_Nc, codebook_Vc, znorm) / temperature, axis=-1)
    p_NV = jnp.exp(log_p_NV)
    mean_V = jnp.mean(p_NV, axis=0)
    # the least normal number keeps 0 log 0 and its gradient finite
    of_mean = -jnp.sum(mean_V * jnp.log(jnp.maximum(mean_V, jnp.finfo(mean_V.dtype).tiny)))
    return -jnp.mean(jnp.sum(p_NV * log_p_NV, axis=-1)) - of_mean


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def upsample_codes(codes_Bnc: jax.Array, scale: int, sides: tuple[Side, ...], phi: Phi) -> jax.Array:
    """Return what a scale adds to f_hat: its codewords `[B, n_l, c]`, upsampled and passed through phi."""
    codes_BYXc = codes_Bnc.reshape(codes_Bnc.shape[0], *shape_of(sides[scale]), -1)
    return phi(scale, resize_bicubic(codes_BYXc, sides[-1]))


def next_input(f_hat_BYXc: jax.Array, scale: int, sides: tuple[Side, ...]) -> jax.Array:
    """Return the transformer's input at scale + 1: f_hat area-averaged to that scale, `[B, n_{l+1}, c]`."""
    pooled = resize_area(f_hat_BYXc, sides[scale + 1])
    return pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])


def encode_residual(
    f_BYXc: jax.Array, codebook_Vc: jax.Array, phi: Phi, sides: tuple[Side, ...], znorm: bool = False
) -> Encoded:
    """Quantize a latent map scale by scale; differentiable in codebook and phi, not through the ids.

    f_BYXc: `[B, Y, X, c] float32` of the shape sides[-1]; it receives no gradient from f_hat.
    """
    B = f_BYXc.shape[0]
    rest, f_hat = f_BYXc, jnp.zeros_like(f_BYXc)
    ids, f_hats, rests = [], [], []
    for scale, side in enumerate(sides):
        pooled = resize_area(rest, side).reshape(B, -1, f_BYXc.shape[-1])
        # no gradient passes through the choice of ids
        ids_Bn = nearest_code(jax.lax.stop_gradient(pooled), codebook_Vc, znorm)
        update = upsample_codes(codebook_Vc[ids_Bn], scale, sides, phi)
        f_hat = f_hat + update
        rest = rest - jax.lax.stop_gradient(update)
        ids.append(ids_Bn)
        f_hats.append(f_hat)
        rests.append(pooled)
    return Encoded(jnp.concatenate(ids, 1), tuple(f_hats), tuple(rests))


def pick_f_hat(f_hats: tuple[jax.Array, ...], num_scales_B: jax.Array) -> jax.Array:
    """Return each row's f_hat after its first `num_scales_B` scales, `[B, Y, X, c]`."""
    picked = f_hats[0]
    for scale, f_hat in enumerate(f_hats[1:], 1):
        picked = jnp.where((num_scales_B > scale)[:, None, None, None], f_hat, picked)
    return picked


def decode_ids(ids_BL: jax.Array, codebook_Vc: jax.Array, phi: Phi, sides: tuple[Side, ...]) -> tuple:
    """Return f_hat after each of the S scales, a tuple of `[B, Y, X, c] float32`, from token ids alone."""
    f_hat: jax.Array | float = 0.0
    f_hats = []
    for scale, (begin, end) in enumerate(itertools.pairwise(offsets_of(areas_of(sides)))):
        f_hat = f_hat + upsample_codes(codebook_Vc[ids_BL[:, begin:end]], scale, sides, phi)
        f_hats.append(f_hat)
    return tuple(f_hats)


def teacher_forcing_input(f_hats: tuple, sides: tuple[Side, ...]) -> jax.Array:
    """Return f_hat after each scale but the last, averaged to the next scale's side: `[B, L - n_0, c] float32`."""
    inputs = [next_input(f_hat, scale, sides) for scale, f_hat in enumerate(f_hats[:-1])]
    B, *_, c = f_hats[0].shape
    return jnp.concatenate([jnp.zeros((B, 0, c), jnp.float32), *inputs], axis=1)


@functools.lru_cache(maxsize=64)
def phi_index(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Return the phi convolution of each scale l: the one whose tick is nearest to l / (S - 1)."""
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    places = [l / max(num_scales - 1, 1) for l in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)
