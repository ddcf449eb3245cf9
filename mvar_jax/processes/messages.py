"""JSON messages, one a line, over sockets."""

import json
import socket
from typing import Any

_READ_BYTES = 2**16


class Connection:
    """A socket that carries JSON objects. A half-read line waits for its rest."""

    def __init__(self, sock: socket.socket):
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
