"""JSON messages, one a line, over sockets."""

import json
import socket
from typing import Any

_READ_BYTES = 2**16
# A host that vanishes closes no connection. The kernel asks after IDLE_S of silence, then every PROBE_S, and gives up
# after NUM_PROBES without an answer: a machine that pauses or a switch that restarts takes less.
IDLE_S, PROBE_S, NUM_PROBES = 30, 10, 5
VANISHED_S = IDLE_S + PROBE_S * NUM_PROBES


class Connection:
    """A socket that carries JSON objects. A half-read line waits for its rest."""

    def __init__(self, sock: socket.socket):
        _keep_alive(sock)
        self.socket = sock
        self._unread = b""

    def fileno(self) -> int:
        """Return the socket's descriptor, for selectors."""
        return self.socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send a message; return whether the other side was still there to take it."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict] | None:
        """Wait for whole messages and return them, one or more; None if the other side is gone.

        Raises ValueError if what came is no JSON object.
        """
        lines: list[bytes] = []
        while not lines:
            try:
                data = self.socket.recv(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                return None
            *lines, self._unread = (self._unread + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message must be a JSON object")
        return messages

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    milliseconds = 1000 * VANISHED_S  # for what was sent, and not yet acknowledged
    options = {"TCP_KEEPIDLE": IDLE_S, "TCP_KEEPINTVL": PROBE_S, "TCP_KEEPCNT": NUM_PROBES}
    for name, value in {**options, "TCP_USER_TIMEOUT": milliseconds}.items():
        if hasattr(socket, name):  # macOS has not all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
