"""Drawing part of a picture anew: known tokens are put back at each scale, known pixels at the end.

A mask is 1 where the picture is to be drawn and 0 where it is known. What lies under it is never seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.resize import resize_area
from mvar_jax.sampling.sampler import ReplaceFn, SampleOptions, guided_logits, sample_pyramid

DRAWN_SHARE = 0.5  # a token of which more than this share is masked is drawn, else it is known
SOFTNESS = 0.5  # tokens masked from 1/4 to 3/4 are mixed
SOFT_BORDER_SHARE = 1 / 32  # of the side: how far into the mask drawn pixels fade in


def check_mask(mask, image_side: int) -> np.ndarray:
    """bool [B, Y, X] of a mask [Y, X] or [B, Y, X], bool or numbers (above 0: draw).

    Raises InputError for another size, and for a mask that leaves nothing to draw or nothing known.
    """
    mask = np.asarray(mask)
    given = tuple(mask.shape)
    mask_BYX = (mask[None] if mask.ndim == 2 else mask) > 0
    if mask_BYX.ndim != 3 or mask_BYX.shape[1:] != (image_side, image_side):
        raise InputError("mask", given, f"the size of the image: [{image_side}, {image_side}], or a batch of them")
    if not mask_BYX.any(axis=(1, 2)).all():
        raise InputError("mask", "empty", "a mask that is above 0 where the picture is to be drawn")
    if mask_BYX.all(axis=(1, 2)).any():
        raise InputError("mask", "all of the picture", "a mask that leaves part of it as it is (to draw all: sample)")
    return mask_BYX


def check_border(border_px: int | None, softness: float, image_side: int) -> int:
    """border_px, or for None its share of the side. Raises InputError unless it is 0 or more and softness 0 to 1."""
    if border_px is None:
        border_px = round(image_side * SOFT_BORDER_SHARE)
    if not border_px >= 0:
        raise InputError("border", border_px, "pixels, 0 or more")
    if not 0 <= softness <= 1:
        raise InputError("softness", softness, "0 (hard) to 1")
    return border_px


def hide_masked(image_BYX3: np.ndarray, mask_BYX: np.ndarray) -> np.ndarray:
    """The images with each masked pixel taken from the nearest known one, so that nothing tells what was there."""

    def hide(image_YX3, mask_YX):
        nearest = ndimage.distance_transform_edt(mask_YX, return_distances=False, return_indices=True)
        return image_YX3[tuple(nearest)]

    return np.stack([hide(image, mask) for image, mask in zip(image_BYX3, mask_BYX, strict=True)])


def blend(before_BYX3: np.ndarray, after_BYX3: np.ndarray, mask_BYX: np.ndarray, border_px: int) -> np.ndarray:
    """`before` outside the mask, to the bit; inside it (1 - a) * before + a * after, a = min(1, d / (border_px + 1)).

    d: distance in pixels to the nearest known one. border_px 0: `after` in all of the mask.
    """
    distance_BYX = np.stack([ndimage.distance_transform_edt(mask) for mask in mask_BYX])
    share = np.minimum(1, distance_BYX / (border_px + 1)).astype(np.float32)[..., None]
    return np.where(mask_BYX[..., None], (1 - share) * before_BYX3 + share * after_BYX3, before_BYX3)


def shrink_onto_canvas(image_YX3: np.ndarray, expand: float) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 image, bool mask) for out-painting: the picture `expand` times smaller in the middle of one of its own
    size, the mask around it. Raises InputError unless that leaves something of both."""
    from PIL import Image

    height, width = image_YX3.shape[:2]
    if not 1 < expand < float("inf"):
        raise InputError("expand", expand, "a factor above 1, as 1.5")
    small = max(1, round(height / expand)), max(1, round(width / expand))
    top, left = (height - small[0]) // 2, (width - small[1]) // 2
    picture = Image.fromarray(image_YX3).resize(small[::-1], Image.Resampling.LANCZOS)
    mask_YX = np.ones((height, width), bool)
    mask_YX[top : top + small[0], left : left + small[1]] = False
    canvas = np.zeros_like(image_YX3)
    canvas[~mask_YX] = np.asarray(picture).reshape(-1, 3)
    return canvas, mask_YX


def drawn_share(mask_BYX: jax.Array, side: int, softness: jax.Array | float) -> jax.Array:
    """float32 [B, N]: how much of each token of a map is drawn, from 0 (known) to 1.

    From m, the masked share of the token's area: 1 above DRAWN_SHARE, else 0; softness s makes it a ramp that
    wide: clip((m - DRAWN_SHARE) / s + 1/2, 0, 1).
    """
    masked_BN = resize_area(mask_BYX[..., None], side).reshape(mask_BYX.shape[0], -1)
    ramp_BN = jnp.clip((masked_BN - DRAWN_SHARE) / jnp.where(softness > 0, softness, 1) + 0.5, 0, 1)
    return jnp.where(softness > 0, ramp_BN, (masked_BN > DRAWN_SHARE).astype(jnp.float32))


def put_back(networks: Networks, known_ids_BL: jax.Array, mask_BYX: jax.Array, softness: jax.Array) -> ReplaceFn:
    """Teacher-forces the tokens outside the mask; codes of a soft border's tokens are mixed by `drawn_share`."""
    pyramid, codebook = networks.transformer.pyramid, networks.tokenizer_params["codebook"]

    def replace(scale, ids_BN, codes_BNc):
        share_BN = drawn_share(mask_BYX, pyramid.sides[scale], softness)
        known_BN = known_ids_BL[:, pyramid.offsets[scale] : pyramid.offsets[scale + 1]]
        share = share_BN[..., None]
        codes = share * codes_BNc + (1 - share) * codebook[known_BN]
        return jnp.where(share_BN > DRAWN_SHARE, ids_BN, known_BN), codes

    return replace


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
    """(ids int32 [B, L], f_hat float32 [B, Y, X, c]): `sample`, with the tokens outside the mask put back.

    mask_BYX: float32, 1 where to draw.
    """
    logits_fn = guided_logits(networks, labels_B, options.cfg)
    replace = put_back(networks, known_ids_BL, mask_BYX, softness)
    ids_BL, f_hat, _ = sample_pyramid(logits_fn, networks, keys_B, options, replace=replace)
    return ids_BL, f_hat
