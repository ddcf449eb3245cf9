"""Reading image files: which errors make a bad image, which is skipped, and which end the run."""

import os
from collections.abc import Callable

from mvar_jax.data.decoding import BadImage
from mvar_jax.errors import shorten
from mvar_jax.files.retries import read_patiently


def read_or_skip(read: Callable[[], bytes], name: str | os.PathLike) -> bytes:
    """Return what `read` returns, tried again as `read_patiently` does.

    Raises BadImage if the file is missing or cannot be opened by this user, RunError if the storage fails.
    """
    try:
        return read_patiently(read, str(name))
    except OSError as error:
        raise BadImage(f"cannot be read: {shorten(error)}") from None


def size_on_disk(path: str | os.PathLike) -> int:
    """Return the size of a file of this machine in bytes, -1 if it is gone. Raises RunError if the storage fails."""
    try:
        return read_patiently(lambda: os.stat(path).st_size, str(path))
    except OSError:
        return -1
