"""What a mask says, for arrays and for image files alike: white or painted is drawn, the rest is kept."""

import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.values import as_array, as_flag

FULL = (1, 255, 65535)  # full scale of a mask: the first of these that no value exceeds
MAX_PAINTS = 16  # opaque pixels of more colours than this are a picture with holes, not paint
CHANNELS = (1, 2, 3, 4)  # grey or RGB, each without or with alpha


def check_mask(mask, height: int, width: int, invert: bool = False) -> np.ndarray:
    """Return a mask of an image, or one for each of B images, as `[B, Y, X] bool`, True where to draw.

    Args:
      mask: `[Y, X]`, `[Y, X, C]`, `[B, Y, X]` or `[B, Y, X, C]`; see `drawn_pixels` for what it says.
      invert: exchange what is drawn and what is kept.

    Raises InputError if the shape differs from the image's, or if a mask draws nothing or keeps nothing.
    """
    invert = as_flag(invert, "invert")
    size, expected = (height, width), f"[{height}, {width}] or [B, {height}, {width}]"
    mask = as_array(mask, "mask", f"an array {expected}")
    given = list(mask.shape)
    if not any(jnp.issubdtype(mask.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise InputError(f"mask must be bool or numbers, got {mask.dtype}", field="mask", given=mask.dtype)
    if mask.shape[:2] == size and (mask.ndim == 2 or (mask.ndim == 3 and mask.shape[2] in CHANNELS)):
        mask = mask[None]
    has_channels = mask.ndim == 4 and mask.shape[3] in CHANNELS
    if not mask.size or mask.shape[1:3] != size or not (mask.ndim == 3 or has_channels):
        raise InputError(
            f"mask must have shape {expected}, got {given}", field="mask", given=given, expected=expected
        )
    mask_BYX = np.stack([drawn_pixels(one.astype(np.float32)) != invert for one in mask])
    name = "inverted mask" if invert else "mask"
    if not mask_BYX.any(axis=(1, 2)).all():
        message = f"{name} must mark some pixels to draw, by white, a colour or paint above half, but marks none"
        raise InputError(message, field="mask", given="empty", expected="some pixels to draw")
    if mask_BYX.all(axis=(1, 2)).any():
        message = f"{name} must leave some pixels as they are, but marks all of them; use sample instead"
        raise InputError(message, field="mask", given="full", expected="some pixels to keep")
    return mask_BYX


def drawn_pixels(mask: np.ndarray) -> np.ndarray:
    """Return where a mask says "draw", `[Y, X] bool`.

    A threshold at half of full scale decides; full scale is 1, 255 or 65535, whichever first holds all values.

    - Grey, or numbers without channels: white is drawn, black is kept.
    - Colours: if any pixel is coloured (its channels differ by more than half), the coloured ones are drawn, whatever
      is behind them; else the bright ones.
    - Transparency, if some pixels are opaque by half and others are not: what is painted is drawn in whatever colour,
      or only its white parts if it is both white and black. Opaque pixels of more than MAX_PAINTS colours are a
      picture out of which the part to draw was cut: the transparent pixels are drawn.

    Args:
      mask: float32, `[Y, X]` or `[Y, X, C]` of 1 to 4 channels, the last of 2 or 4 being alpha.

    Raises InputError if a value is negative, not finite or above 65535.
    """
    if mask.ndim == 2:
        return _share(mask) > 0.5
    num_colours = mask.shape[-1] - (mask.shape[-1] in (2, 4))
    colour, alpha = mask[..., :num_colours], mask[..., num_colours:]
    if alpha.size == 0 or alpha.min() == alpha.max():
        return _bright_or_coloured(colour)
    is_opaque = _share(alpha[..., 0]) > 0.5
    colour = np.where(is_opaque[..., None], colour, 0)  # a transparent pixel's colour cannot be seen
    if _num_colours(colour[is_opaque]) > MAX_PAINTS and not is_opaque.all():
        return ~is_opaque
    is_drawn = _bright_or_coloured(colour)
    return is_drawn if is_opaque.all() or 0 < is_drawn.sum() < is_opaque.sum() else is_opaque


def _bright_or_coloured(colour_YXC: np.ndarray) -> np.ndarray:
    share = _share(colour_YXC)
    high, low = share.max(axis=-1), share.min(axis=-1)
    is_coloured = high - low > 0.5
    return is_coloured if is_coloured.any() else high > 0.5


def _num_colours(colours_NC: np.ndarray) -> int:
    levels = np.rint(_share(colours_NC) * 65535).astype(np.int64)
    return len(np.unique(levels @ (65536 ** np.arange(levels.shape[-1]))))


def _share(values: np.ndarray) -> np.ndarray:
    """Return values as shares of full scale."""
    lowest, highest = (values.min(), values.max()) if values.size else (0, 0)
    if not (lowest >= 0 and highest <= FULL[-1]):  # NaN is neither
        given, expected = f"{lowest:g} to {highest:g}", "bool, or numbers from 0 to 1, 255 or 65535"
        raise InputError(f"mask must be {expected}, got {given}", field="mask", given=given, expected=expected)
    return values / next(full for full in FULL if highest <= full)
