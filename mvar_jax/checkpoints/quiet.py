"""Orbax without its narration."""

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop Orbax's log records: it narrates every save through absl and repeats the errors that it raises anyway."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
