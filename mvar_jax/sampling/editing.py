"""Editing of part of an image: known tokens are restored at each scale; known pixels see `squares`.

A mask is 1 where the image is drawn and 0 where it is known. The model never sees the pixels under the mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.resize import resize_area
from mvar_jax.sampling.options import DRAWN_SHARE, Known, SampleOptions
from mvar_jax.sampling.sampler import guided_logits, sample_pyramid
from mvar_jax.values import as_real

SOFTNESS = 0.5  # tokens masked from 1/4 to 3/4 are mixed
SOFT_BORDER_SHARE = 1 / 32  # default width of the fade inside the mask, as a share of the side


def check_border(border_px: float | None, softness: float, image_side: int) -> float:
    """Return border_px, by default a share of the side. Raises InputError if it or softness is out of range."""
    if border_px is None:
        border_px = round(image_side * SOFT_BORDER_SHARE)
    as_real(softness, "softness", 0, 1, "from 0 (a hard border) to 1")
    return as_real(border_px, "border", 0, 1e6, "0 pixels or more")


def shrink_onto_canvas(image_YX3: np.ndarray, expand: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8 image, bool mask) for out-painting: the image shrunk `expand` times, centred, masked around it.

    Raises InputError unless expand is finite and large enough that some pixels are masked.
    """
    from PIL import Image

    from mvar_jax.files.images import to_picture

    height, width = image_YX3.shape[:2]
    if not 1 < expand < float("inf"):
        message = f"expand must be a finite factor above 1, such as 1.5, got {expand}"
        raise InputError(message, field="expand", given=expand, expected="finite and above 1")
    small = max(1, round(height / expand)), max(1, round(width / expand))
    top, left = (height - small[0]) // 2, (width - small[1]) // 2
    shrunk = to_picture(image_YX3).resize(small[::-1], Image.Resampling.LANCZOS)
    mask_YX = np.ones((height, width), bool)
    mask_YX[top : top + small[0], left : left + small[1]] = False
    if not mask_YX.any():
        message = f"expand must leave room around {width} x {height} pixels, got {expand}; use 1.2 or more"
        raise InputError(message, field="expand", given=expand, expected="larger")
    canvas = np.zeros_like(image_YX3)
    canvas[~mask_YX] = np.asarray(shrunk).reshape(-1, image_YX3.shape[2])
    return canvas, mask_YX


def drawn_share(mask_BYX: jax.Array, side: int, softness: jax.Array | float) -> jax.Array:
    """Return how much of each token of a map is drawn, from 0 (known) to 1, `[B, N] float32`.

    With m the masked share of the token's area and s the softness: clip((m - DRAWN_SHARE) / s + 1/2, 0, 1), or
    m > DRAWN_SHARE if s is 0.
    """
    masked_BN = resize_area(mask_BYX[..., None], side).reshape(mask_BYX.shape[0], -1)
    ramp_BN = jnp.clip((masked_BN - DRAWN_SHARE) / jnp.where(softness > 0, softness, 1) + 0.5, 0, 1)
    return jnp.where(softness > 0, ramp_BN, (masked_BN > DRAWN_SHARE).astype(jnp.float32))


def known_tokens(networks: Networks, known_ids_BL: jax.Array, mask_BYX: jax.Array, softness: jax.Array):
    """Return a function from a scale to its `Known` tokens, those outside the mask; see `drawn_share`."""
    pyramid = networks.transformer.pyramid

    def known(scale: int) -> Known:
        ids_BN = known_ids_BL[:, pyramid.offsets[scale] : pyramid.offsets[scale + 1]]
        return Known(ids_BN, drawn_share(mask_BYX, pyramid.sides[scale], softness))

    return known


@functools.partial(jax.jit, static_argnames=("options",))
def redraw(
    networks: Networks,
    known_ids_BL: jax.Array,
    mask_BYX: jax.Array,
    labels_B: jax.Array,
    keys_B: jax.Array,
    options: SampleOptions,
    softness: jax.Array,
):
    """Sample with the tokens outside the mask restored at each scale.

    Args:
      known_ids_BL: ids of the images to edit, `[B, L] int32`.
      mask_BYX: `[B, Y, X] float32`, 1 where to draw.
      labels_B, keys_B, options: as in `sample`.
      softness: 0 to 1, see `drawn_share`.

    Returns (ids `[B, L] int32`, f_hat `[B, Y, X, c] float32`).
    """
    logits_fn = guided_logits(networks, labels_B, options.cfg)
    known = known_tokens(networks, known_ids_BL, mask_BYX, softness)
    ids_BL, f_hat, _ = sample_pyramid(logits_fn, networks, keys_B, options, known=known)
    return ids_BL, f_hat
