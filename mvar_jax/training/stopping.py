"""SIGINT and SIGTERM as a flag that a run checks between steps."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopFlag:
    """A flag that SIGINT and SIGTERM set while it is entered in the main thread; other threads leave signals alone.

    With several processes SIGTERM is left to JAX's preemption service, which agrees with the others on a step that
    none has passed; SIGINT is passed to it.
    """

    def __init__(self):
        self._number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
            self._previous = {number: signal.signal(number, self._catch) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def agreed_number(self, step: int) -> int | None:
        """Return the signal that ends the run before `step`, the same in all processes. Call at every step."""
        if jax.process_count() == 1:
            return self._number or None
        return (self._number or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    def _catch(self, number: int, frame) -> None:
        self._number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        # not print: a handler may run in the middle of one
        os.write(2, b"\nstopping after this step with a checkpoint (Ctrl-C again: at once, without)\n")
