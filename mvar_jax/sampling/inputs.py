"""Images, token ids and numbers of samples that users give to a model, checked and in the form of its programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError, show
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.ops.pixels import from_levels
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.scales import Side, areas_of, shape_of
from mvar_jax.values import INDEX_RANGE, MAX_INDEX, as_array

ROUNDING = 1e-3  # by which a float image may leave [-1, 1]


def check_images(images_BYXC: Any, side: Side | None = None, channels: int = 3) -> np.ndarray:
    """Return images as `[B, Y, X, C] float32` in [-1, 1].

    Args:
      images_BYXC: uint8, converted as the training data are, or float in [-1, 1].
      side: height and width that they must have, one number if equal; None: any.
      channels: that they must have.

    Raises InputError for another shape or dtype, no image, or values that are not finite or out of range by more than
    rounding.
    """
    height, width = ("Y", "X") if side is None else shape_of(side)
    expected = f"an array [B, {height}, {width}, {channels}]"
    images = as_array(images_BYXC, "images", expected)
    size = images.shape[1:3] if side is None else shape_of(side)
    _check_form("images", images, expected, images.size > 0 and images.shape[1:] == (*size, channels))
    if images.dtype == np.uint8:
        return from_levels(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 too
        expected = "uint8, or float in [-1, 1]"
        words = f"images must be {expected}, got {images.dtype}; convert levels 0 to 255 with astype(np.uint8)"
        raise InputError(words, field="images", given=images.dtype, expected=expected)
    with np.errstate(over="ignore"):
        images = images.astype(np.float32, copy=False)
    low, high = images.min(), images.max()
    if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):
        given, expected = f"{low:g} to {high:g}", "finite and from -1 to 1"
        words = f"images must be {expected}, got {given}; pass levels 0 to 255 as uint8, and clip what goes beyond"
        raise InputError(words, field="images", given=given, expected=expected)
    return images


def check_features(f_hat_BYXc: Any, tokenizer: Tokenizer) -> jax.Array:
    """Return latent maps as an array. Raises InputError unless they are finite `[B, y, x, c]` with B of 1 or more."""
    shape = (*shape_of(tokenizer.sides[-1]), tokenizer.code_width)
    expected = f"float {['B', *shape]}".replace("'", "")
    f_hat = f_hat_BYXc if isinstance(f_hat_BYXc, jax.Array) else as_array(f_hat_BYXc, "f_hat", expected)
    is_right = f_hat.shape[1:] == shape and jnp.issubdtype(f_hat.dtype, jnp.floating)
    _check_form("f_hat", f_hat, expected, is_right)
    # not those of jax: they may be traced, and to look at the model's own would wait for the device
    if not isinstance(f_hat, jax.Array) and not np.isfinite(f_hat.astype(np.float32)).all():
        words = "f_hat must be finite numbers, got NaN or infinity"
        raise InputError(words, field="f_hat", given="NaN or infinity", expected="finite numbers")
    return jnp.asarray(f_hat)


def check_ids(ids_BL: Any, tokenizer: Tokenizer) -> np.ndarray:
    """Return token ids as `[B, L] int32`. Raises InputError for another shape or dtype, no row, or an unknown id."""
    num_tokens, vocab_size = sum(areas_of(tokenizer.sides)), tokenizer.vocab_size
    expected = f"integers [B, {num_tokens}]"
    ids = as_array(ids_BL, "ids", expected)
    _check_form("ids", ids, expected, ids.shape[1:] == (num_tokens,) and np.issubdtype(ids.dtype, np.integer))
    if not (ids.min() >= 0 and ids.max() < vocab_size):
        given, expected = f"{ids.min()} to {ids.max()}", f"0 to {vocab_size - 1}"
        raise InputError(f"ids must be from {expected}, got {given}", field="ids", given=given, expected=expected)
    return ids.astype(np.int32)


def check_index(index_B: Any, num: int) -> np.ndarray:
    """Return the numbers of `num` samples, `[num] uint32`; None means 0, 1, 2, ....

    Raises InputError unless they are integers from 0 to 2**32 - 1, one for each sample.
    """
    if index_B is None:
        return np.arange(num, dtype=np.uint32)
    expected = f"integers [{num}] {INDEX_RANGE}, one for each label"
    index = as_array(index_B, "index", expected)
    is_right = index.shape == (num,) and np.issubdtype(index.dtype, np.integer)
    given = f"{index.dtype} {list(index.shape)}"
    if is_right and (index.min() < 0 or index.max() > MAX_INDEX):
        is_right, given = False, f"{index.min()} to {index.max()}"
    if not is_right:
        raise InputError(f"index must be {expected}, got {given}", field="index", given=given, expected=expected)
    return index.astype(np.uint32)


def check_cfgs(cfgs_K: Any) -> np.ndarray:
    """Return guidances as `[K] float32`. Raises InputError if there is none, or one is out of range."""
    expected = "a list of one or more numbers"
    cfgs = as_array(cfgs_K, "cfgs", expected)
    if cfgs.ndim != 1 or not len(cfgs):
        words = f"cfgs must be {expected}, got {show(cfgs_K)}"
        raise InputError(words, field="cfgs", given=cfgs_K, expected=expected)
    return np.asarray([SampleOptions(cfg).cfg for cfg in cfgs], np.float32)


def check_rows(labels_B: np.ndarray, ids_BL: np.ndarray) -> None:
    """Raise InputError unless there is one label for each row of ids."""
    if len(labels_B) != len(ids_BL):
        given, expected = len(labels_B), f"{len(ids_BL)}, one for each row of ids"
        raise InputError(f"labels must be {expected}, got {given}", field="labels", given=given, expected=expected)


def _check_form(field: str, array: Any, expected: str, is_right: bool) -> None:
    if not is_right or not len(array):
        given = f"{array.dtype} {list(array.shape)}"
        words = f"{field} must be {expected} with B of 1 or more, got {given}"
        raise InputError(words, field=field, given=given, expected=expected)
