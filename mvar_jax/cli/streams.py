"""Standard streams that may go away while a command runs: a closed pipe, a lost terminal, a full disk."""

import os
import sys


class DroppingStream:
    """A text stream whose writes never fail: what cannot be written is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text or drop it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        """Write what is buffered or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


def guard_streams() -> None:
    """Let no write to stdout or stderr end the process: a run must not depend on who reads its progress.

    A stream that was closed before the start becomes /dev/null, or the next file to be opened would take its number
    and with it whatever libraries print.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number, this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
        setattr(sys, name, DroppingStream(stream))
