"""Numbers and arrays that users give, in Python or on the command line, as plain Python numbers and numpy arrays."""

import operator
from typing import Any

import numpy as np

from mvar_jax.errors import InputError, show

MAX_INDEX = 2**32 - 1  # seeds and numbers of samples are unsigned 32-bit integers
INDEX_RANGE = "from 0 to 2**32 - 1"


def as_integer(value: Any, field: str, least: int, greatest: int | None = None, expected: str | None = None) -> int:
    """Return an integer of Python, numpy or jax as an int.

    Raises InputError unless it is an integer from least to greatest. expected: what the error says instead of that.
    """
    number = _scalar(value, operator.index, "iuO")
    expected = expected or (f"{least} or more" if greatest is None else f"from {least} to {greatest}")
    if number is None:
        raise _refuse(field, f"a whole number, {expected}", value)
    if number < least or (greatest is not None and number > greatest):
        raise _refuse(field, expected, number)
    return number


def as_integers(values: Any, field: str) -> tuple[int, ...]:
    """Return a list, tuple or array of integers of 0 or more as a tuple of ints. Raises InputError for others."""
    expected = "a list of whole numbers of 0 or more"
    is_list = isinstance(values, list | tuple | range) or getattr(values, "ndim", 0) == 1
    if not is_list:
        raise _refuse(field, expected, values)
    return tuple(as_integer(value, field, 0) for value in values)


def as_pair(value: Any, field: str, expected: str) -> tuple[Any, Any]:
    """Return a list or tuple of two as a tuple. Raises InputError for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _refuse(field, expected, value)
    return value[0], value[1]


def as_real(value: Any, field: str, least: float, greatest: float, expected: str) -> float:
    """Return a number of Python, numpy or jax as a float. Raises InputError unless it is from least to greatest."""
    number = _scalar(value, float, "iufV")  # V: bfloat16
    if number is None:
        raise _refuse(field, f"a number, {expected}", value)
    if not least <= number <= greatest:
        raise _refuse(field, expected, number)
    return number


def as_num_each(num: Any, num_labels: int) -> int:
    """Return the number of samples of each label. Raises InputError unless all of them can have a number."""
    return as_integer(num, "num", 1, MAX_INDEX // max(1, num_labels))


def as_flag(value: Any, field: str) -> bool:
    """Return a truth value of Python, numpy or jax as a bool. Raises InputError unless it is true, false, 1 or 0."""
    flag = _scalar(value, bool, "biu")
    if flag is None or value not in (0, 1):
        raise _refuse(field, "True or False", value)
    return flag


def as_seed(value: Any) -> int:
    """Return a seed as an int. Raises InputError unless it is an integer from 0 to 2**32 - 1.

    JAX would take others modulo 2**32, so that two seeds would give the same samples.
    """
    return as_integer(value, "seed", 0, MAX_INDEX, INDEX_RANGE)


def as_array(value: Any, field: str, expected: str) -> np.ndarray:
    """Return an array of numpy or jax, or nested lists, as a numpy array. Raises InputError for anything else."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):  # a ragged list, a traced array
        raise _refuse(field, expected, value) from None


def _scalar(value: Any, convert, kinds: str) -> Any:
    """Return one number, None if it is text, an array or of a dtype of another kind."""
    try:
        array = np.asarray(value)
        return convert(value) if array.ndim == 0 and array.dtype.kind in kinds else None
    except (TypeError, ValueError, OverflowError):
        return None


def _refuse(field: str, expected: str, given: Any) -> InputError:
    words = f"{field} must be {expected}, got {show(given)}"
    return InputError(words, field=field, given=given, expected=expected)
