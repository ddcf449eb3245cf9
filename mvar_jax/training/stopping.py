"""Signals as a flag that a run checks between steps, agreed on by all its processes."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from mvar_jax.processes import group
from mvar_jax.processes.join import start_preemption_service
from mvar_jax.stopping import StopFlag, raise_stopped


class RunStopFlag(StopFlag):
    """A flag that SIGINT, SIGTERM and SIGHUP set; a second SIGINT raises KeyboardInterrupt.

    With several processes SIGTERM is left to JAX's preemption service from then on, which agrees with the others on a
    step that none has passed; the other signals are passed to it.
    """

    def __init__(self):
        own = (signal.SIGTERM,) if jax.process_count() == 1 else ()
        super().__init__((signal.SIGINT, signal.SIGHUP, *own), "stopping after this step with a checkpoint")

    def __enter__(self):
        if jax.process_count() > 1:
            start_preemption_service()
        return super().__enter__()

    def agreed_number(self, step: int) -> int | None:
        """Return the signal that ends the run before `step`, the same in all processes. Call at every step.

        SIGINT counts most: who presses Ctrl-C does not want the run to be started again.
        """
        if jax.process_count() == 1:
            return self._number
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        numbers = group.current().gather("the signal", self._number)  # None: no signal, or SIGTERM to JAX alone
        return signal.SIGINT if signal.SIGINT in numbers else next(filter(None, numbers), signal.SIGTERM)

    def _catch(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            self._notice += " (Ctrl-C again: at once, without)"
            signal.signal(number, raise_stopped)
        super()._catch(number, frame)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
