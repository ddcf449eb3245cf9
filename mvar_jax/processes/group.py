"""The group of a run's processes, seen from one of them: agree with the others, leave together with them."""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from mvar_jax.errors import InputError
from mvar_jax.processes.messages import Connection
from mvar_jax.stopping import LOST_STATUS, STOPPED_STATUS

CONNECT_S = 30
ANSWER_S = 10  # after which a process that failed no longer waits for the first one

_at_leave: list[Callable[[], None]] = []


def at_leave(function: Callable[[], None]) -> None:
    """Call a function when this process leaves abruptly; `atexit` functions are not called then."""
    _at_leave.append(function)


class Group:
    """The processes of a run. A process that runs alone is a group of one.

    index: this process's number. count: number of processes.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return the JSON values that all processes gave, by process; every process must call this with the name."""
        return [value]

    def wait_for_all(self, name: str) -> None:
        """Return when every process has called this with the same name."""
        self.gather(name, None)

    def check_same(self, field: str, what: str, value: dict[str, Any]) -> None:
        """Raise InputError in every process unless all have the same value.

        Args:
          field: name of the option for the error.
          what: what the value is, such as "train data".
          value: JSON values by name; the error shows the first one that differs.
        """
        values = self.gather(field, value)
        for index, other in enumerate(values):
            if other == values[0]:
                continue
            keys = [key for key in {**values[0], **other} if values[0].get(key) != other.get(key)]
            key, theirs, ours = keys[0], other.get(keys[0]), values[0].get(keys[0])
            message = f"process {index} of {self.count} has {what} {key}={theirs!r}, process 0 has {key}={ours!r}; "
            message += "all processes must be given the same"
            raise InputError(message, field=field, given=theirs, expected=repr(ours))

    def fail(self, status: int, reason: str) -> NoReturn:
        """End all processes with this exit status; the first one prints the reason."""
        say_why(status, reason)
        leave(status)

    def close(self) -> None:
        """Part from the others, who are done too."""


class JoinedGroup(Group):
    """A group of several processes that are connected by a hub (see hub.py).

    Args:
      index, count: of this process.
      address: host and port of the hub.
      token: what the hub wants to see.

    Raises InputError if the hub cannot be reached.
    """

    def __init__(self, index: int, count: int, address: tuple[str, int], token: str):
        super().__init__(index, count)
        self._is_closing = False
        self._answers: queue.SimpleQueue[list] = queue.SimpleQueue()
        self._connection = Connection(_connect(index, address))
        self._connection.send(index=index, token=token)
        threading.Thread(target=self._listen, name="group", daemon=True).start()

    def gather(self, name: str, value: Any) -> list[Any]:
        self._connection.send(kind="value", name=name, value=value)
        return self._answers.get()

    def fail(self, status: int, reason: str) -> NoReturn:
        self._connection.send(kind="failed", status=status, reason=reason)
        time.sleep(ANSWER_S)  # `_listen` leaves when the hub says so
        Group.fail(self, status, reason)

    def close(self) -> None:
        self._is_closing = True
        self._connection.send(kind="done")
        with contextlib.suppress(queue.Empty):
            self._answers.get(timeout=ANSWER_S)  # the hub answers when all are done

    def _listen(self) -> None:
        while (messages := self._connection.receive()) is not None:
            for message in messages:
                if message["kind"] == "leave":
                    leave(message["status"])
                self._answers.put(message["values"])
        if not self._is_closing:
            words = "the first process ended without a word (killed, out of memory, or its host was lost)"
            Group.fail(self, LOST_STATUS, words)


def say_why(status: int, reason: str) -> None:
    """Print why a command ends: an error unless a signal was the reason."""
    with contextlib.suppress(OSError, ValueError):
        print(reason if status in (STOPPED_STATUS, 130) else f"error: {reason}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End this process at once: nothing waits for other processes or unfinished work."""
    for function in reversed(_at_leave):
        with contextlib.suppress(Exception):
            function()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _connect(index: int, address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            sock = socket.create_connection(address, timeout=5)
            sock.settimeout(None)
            return sock
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"{address[0]}:{address[1]}"
                words = f"process {index} cannot reach the first process at {where} ({error.strerror or error}); "
                words += "open the port between the hosts, or set MVAR_PORT to one that is open"
                raise InputError(words, field="distributed", given=where, expected="a reachable port") from None
            time.sleep(0.2)


_current = Group()


def current() -> Group:
    """Return the group that this process has joined, a group of one if it has not."""
    return _current


def set_current(group: Group) -> None:
    """Make a group the one that `current` returns."""
    global _current
    _current = group
