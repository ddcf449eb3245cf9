"""The hub of a run: a thread of the first process, to which every process holds a connection.

It gathers values for agreements. If a process fails or ends without saying so, it tells all others to leave.
"""

import contextlib
import hmac
import secrets
import selectors
import socket
import threading
import time

from mvar_jax.processes.group import say_why
from mvar_jax.processes.messages import Connection
from mvar_jax.stopping import LOST_STATUS

# Of failures that come together a death counts most, then the lowest process: the others are often its consequence.
FAILURES_TOGETHER_S = 0.5
HELLO_S = 5.0  # a stranger must not hold the others up for longer
LEAVE_S = 5.0  # how long the first process waits for the others: JAX aborts a process that loses the first one
_POLL_S = 0.1


class Hub:
    """A server for `count` members. port: where it listens; token: what a member must show."""

    def __init__(self, count: int, port: int = 0):
        self.token = secrets.token_hex(16)
        self._count = count
        self._server = _listen(port)
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._members: dict[int, Connection] = {}
        self._values: dict[int, tuple[str, object]] = {}
        self._done: set[int] = set()
        self._failures: dict[int, tuple[int, str]] = {}
        self._dead: set[int] = set()
        self._failed_at: float | None = None
        threading.Thread(target=self._serve, name="hub", daemon=True).start()

    def _serve(self) -> None:
        while len(self._done) < self._count:
            for key, _ in self._selector.select(_POLL_S):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            if self._failed_at is not None and time.monotonic() - self._failed_at > FAILURES_TOGETHER_S:
                self._end()
                return
        self._send_values([])

    def _accept(self) -> None:
        sock, _ = self._server.accept()
        connection = Connection(sock)
        sock.settimeout(HELLO_S)
        try:
            hello, *messages = connection.receive() or [{}]
        except ValueError:
            hello, messages = {}, []
        index = hello.get("index")
        is_trusted = hmac.compare_digest(str(hello.get("token")).encode("utf-8", "replace"), self.token.encode())
        if not is_trusted or not isinstance(index, int) or not 0 <= index < self._count or index in self._members:
            connection.close()
            return
        sock.settimeout(None)
        self._members[index] = connection
        self._selector.register(connection, selectors.EVENT_READ, index)
        self._take(index, messages)

    def _read(self, index: int) -> None:
        connection = self._members[index]
        try:
            messages = connection.receive()
        except ValueError:
            messages = None
        if messages is None:
            self._selector.unregister(connection)
            connection.close()
            if index not in self._done:
                self._dead.add(index)
                words = "it ended without a word (killed, out of memory, or its host was lost)"
                self._note(index, LOST_STATUS, words)
            return
        self._take(index, messages)

    def _take(self, index: int, messages: list[dict]) -> None:
        for message in messages:
            if message["kind"] == "done":
                self._done.add(index)
            elif message["kind"] == "failed":
                self._note(index, message["status"], message["reason"])
            else:
                self._values[index] = message["name"], message["value"]
                self._answer_if_all_came()

    def _answer_if_all_came(self) -> None:
        if len(self._values) < self._count:
            return
        values, self._values = self._values, {}
        names = {name for name, _ in values.values()}
        if len(names) > 1:
            self._note(0, 1, f"the processes wait for different things: {', '.join(sorted(names))}")
            return
        self._send_values([values[index][1] for index in range(self._count)])

    def _send_values(self, values: list) -> None:
        for _, connection in sorted(self._members.items(), reverse=True):  # the first process may end before the rest
            connection.send(kind="gathered", values=values)

    def _note(self, index: int, status: int, reason: str) -> None:
        self._failures.setdefault(index, (status, reason))
        self._failed_at = self._failed_at or time.monotonic()

    def _end(self) -> None:
        """Print the reason, tell all others to leave, and the first process when they have."""
        index = min(self._failures, key=lambda index: (index not in self._dead, index))
        status, reason = self._failures[index]
        say_why(status, f"process {index} of {self._count}: {reason}")
        others = {i: connection for i, connection in self._members.items() if i}
        for connection in others.values():
            connection.send(kind="leave", status=status)
        deadline = time.monotonic() + LEAVE_S
        for connection in others.values():
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
                connection.socket.settimeout(max(0.01, deadline - time.monotonic()))
                while connection.receive() is not None:
                    pass
        self._members[0].send(kind="leave", status=status)


def _listen(port: int) -> socket.socket:
    """Return a server socket on all addresses of this host, of both IP versions if it has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
