"""SIGINT and SIGTERM as a flag that a run looks at between steps."""

import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopFlag:
    """Turns SIGINT and SIGTERM into a flag while it is entered; only a main thread may."""

    def __init__(self):
        self._number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._catch) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def agreed_number(self, step: int, every_steps: int) -> int | None:
        """The signal caught so far. Several processes agree on it, now and then because that costs."""
        if jax.process_count() == 1:
            return self._number or None
        if step % every_steps:
            return None
        return int(multihost_utils.process_allgather(np.int32(self._number)).max()) or None

    def _catch(self, number: int, frame) -> None:
        self._number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        # Not print: a handler may run in the middle of one.
        os.write(2, b"\nstopping after this step with a checkpoint (Ctrl-C again: at once, without)\n")
