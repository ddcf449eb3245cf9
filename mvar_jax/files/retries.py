"""Reading what a storage may fail to deliver for a moment."""

import time
from collections.abc import Callable
from typing import TypeVar

from mvar_jax.errors import RunError, is_input_error, shorten

PAUSES_S = (0.1, 0.5, 2.0)  # before each further try

T = TypeVar("T")


def read_patiently(read: Callable[[], T], name: str) -> T:
    """Return what `read` returns; try again after an error that may pass.

    An error of the file's own name or permissions (`is_input_error`) stays as it is, so it is raised at once. Any
    other, such as ESTALE, EIO or EMFILE, says nothing about the file: a server, a disk or this process fails.

    Args:
      read: reads a file or asks for its size.
      name: of the file, for the error.

    Raises:
      OSError: the file is missing or cannot be opened by this user.
      RunError: the last try failed too.
    """
    for pause in PAUSES_S:
        try:
            return read()
        except OSError as error:
            if is_input_error(error):
                raise
        time.sleep(pause)
    try:
        return read()
    except OSError as error:
        if is_input_error(error):
            raise
        words = (
            f"{name} cannot be read: {shorten(error)} ({len(PAUSES_S) + 1} tries); run the command again when the "
        )
        raise RunError(f"{words}storage works, or remove the file if it alone is damaged") from error
