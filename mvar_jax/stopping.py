"""The signals that end a command early, and the exit status that tells a supervisor to run it again."""

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

# EX_TEMPFAIL of sysexits.h: SIGTERM or SIGHUP ended the command early, all files are whole, and the same command
# continues. A supervisor that starts it again on this status, and on that of a lost process, repeats no mistake.
STOPPED_STATUS = 75
# Another process of the run ended without a word: it was killed, or its host was lost. This one has no fault to look
# for, so a supervisor starts it again, from the newest checkpoint. If JAX notices first, it aborts: status 134.
LOST_STATUS = 76


class Stopped(BaseException):
    """The end of a command by a signal. Like KeyboardInterrupt, it is no Exception that a library would catch."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command continues")


class StopFlag:
    """A flag that signals set while it is entered in the main thread; other threads leave signals alone.

    A SIGHUP that was ignored before, as under nohup, stays ignored.

    Args:
      numbers: the signals that set the flag.
      notice: what a signal writes to stderr.
    """

    def __init__(self, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGHUP), notice: str = "stopping"):
        self._numbers, self._notice = numbers, notice
        self._number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in self._numbers if not _is_ignored_hangup(number)]
            self._previous = {number: signal.signal(number, self._catch) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def raise_if_set(self) -> None:
        """Raise Stopped if a signal has come. Call between pieces of work, when every file is whole."""
        if self._number is not None:
            raise Stopped(self._number)

    def _catch(self, number: int, frame) -> None:
        self._number = number
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self._notice}\n".encode())  # not print: a handler may run in the middle of one


def raise_stopped(number: int, frame: Any) -> NoReturn:
    """Handle a signal: raise KeyboardInterrupt for SIGINT, else Stopped. A second one ends the process at once."""
    signal.signal(number, signal.SIG_DFL)  # a handler of Python's would print a traceback from wherever it is called
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def raise_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise in the main thread, see `raise_stopped`.

    For the time before a command has something to finish, which it guards by a StopFlag.
    """
    _handle(raise_stopped)


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the process at once, for the time when a command has returned its status."""
    _handle(signal.SIG_DFL)


def _handle(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _is_ignored_hangup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
