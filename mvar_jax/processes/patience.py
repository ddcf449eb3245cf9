"""How long processes wait for each other and for their storage, from variables of the environment."""

import os

from mvar_jax.errors import InputError


def read_seconds(variable: str, default_s: float, below_s: int) -> float:
    """Return the seconds that a variable of the environment sets.

    Args:
      variable: its name.
      default_s: if it is not set.
      below_s: what it must be below; it must also be above 0.

    Raises InputError for anything else.
    """
    text = os.environ.get(variable, str(default_s))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0 < seconds < below_s:
        return seconds
    expected = f"a number of seconds above 0 and below {below_s}"
    words = f"{variable} must be {expected}, got {text!r}"
    raise InputError(words, field=variable, given=text, expected=expected)
