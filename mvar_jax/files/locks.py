"""Locks that let one program at a time use a folder: the file system's own or, if it has none, a lease file.

A lock (`flock`) ends with its process. File systems without locks (Lustre, FUSE) and object stores get a lease: a
file that names its holder, who renews it all the time and removes it at the end. A lease that is not renewed for
MVAR_LEASE_SECONDS (60) has expired; that of a process of this machine that no longer runs is recognised at once.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Protocol

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.paths import is_store

LOCK_FILE = ".lock"
LEASE_FILE = ".lease"
SECONDS_VARIABLE = "MVAR_LEASE_SECONDS"
DEFAULT_S = 60.0
_BEATS = 6  # renewals of a lease until it would expire
_SETTLE_S = 1.0  # then a lease that two processes took at once has one holder, who reads its own name
_LEAVE_S = 3.0
_GONE = (errno.ENOENT, errno.ESTALE)  # the latter of NFS, if another machine has removed the file
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Lock(Protocol):
    """A folder that this process holds."""

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""


def acquire(folder: Path, field: str) -> Lock:
    """Hold a folder, which is made if it is missing, until `release`.

    Raises InputError if another process holds it, if it cannot be written, or if its name is not UTF-8, which the
    libraries that write checkpoints and shards need. field: option that named the folder.
    """
    if os.fsencode(folder).decode(errors="ignore") != str(folder):
        words = f"{field} must be a path in UTF-8, got {str(folder)!r}"
        raise InputError(words, field=field, given=str(folder), expected="a path in UTF-8")
    try:
        if is_store(folder):
            return _Lease(folder, field)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _FileLock(folder, field)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            reason = f"its file system has no locks ({shorten(error)})"
            _say(f"{field} {folder}: {reason}; the lease {LEASE_FILE} is kept instead")
        return _Lease(folder, field)
    except OSError as error:
        words = f"{field} {folder} cannot be written: {shorten(error)}"
        raise InputError(words, field=field, given=str(folder), expected="a writable directory") from error


class _FileLock:
    """A lock of the file system, with the holder's name in the file, which is removed at the end."""

    def __init__(self, folder: Path, field: str):
        self._path = folder / LOCK_FILE
        while not self._take(folder, field):
            continue

    def _take(self, folder: Path, field: str) -> bool:
        """Lock the file; return whether it is still the one in the folder, which the last holder may have removed."""
        self._file: IO[str] = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_in_place():
                self._file.close()
                return False
            self._file.truncate(0)
            self._file.write(json.dumps(_own_name()))
            self._file.flush()
            return True
        except OSError as error:
            self._file.seek(0)
            holder = _parse(self._file.read())
            self._file.close()
            if error.errno in _NO_LOCKS:
                self._path.unlink(missing_ok=True)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _refuse(folder, field, holder) from error
            raise

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False

    def release(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if self._is_in_place():
                    self._path.unlink()  # while it is locked: whoever waits for it looks whether it is in place
            self._file.close()


class _Lease:
    """A lease file, renewed by a thread.

    If another process has taken it, which happens only to a process that stood still for longer than the lease, this
    one is ended by SIGTERM.
    """

    def __init__(self, folder: Path, field: str):
        self._folder, self._field, self._path = folder, field, folder / LEASE_FILE
        self._seconds = _lease_seconds()
        self._name = {**_own_name(), "holder": secrets.token_hex(8), "seconds": self._seconds, "beat": 0}
        while not self._take():
            self._make_way()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._thread.join(self._seconds)
        with contextlib.suppress(OSError):
            if _parse(self._read()).get("holder") == self._name["holder"]:
                self._path.unlink()

    def _text(self) -> str:
        return json.dumps(self._name)

    def _read(self) -> str:
        """Return the content, "" if there is no lease."""
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _take(self) -> bool:
        """Write the lease unless there is one; return whether it is ours."""
        try:
            if is_store(self._path):
                self._path.write_new(self._text().encode())  # type: ignore[attr-defined]
            else:
                with self._path.open("x") as file:
                    file.write(self._text())
        except FileExistsError:
            return False
        time.sleep(_SETTLE_S)
        return self._read() == self._text()

    def _make_way(self) -> None:
        """Remove a lease whose holder is gone. Raises InputError if the holder lives."""
        there = self._read()
        holder = _parse(there)
        if not there or _has_ended(holder):
            return self._remove(there)
        who, seconds = _describe(holder), holder.get("seconds", self._seconds)
        _say(f"{self._field} {self._folder} has a lease of {who}: waiting up to {seconds:.0f} s for a renewal")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / _BEATS))
            now = self._read()
            if now and now != there:
                raise _refuse(self._folder, self._field, _parse(now))
            if not now:
                return None
        _say(f"{self._field} {self._folder}: the lease of {who} has expired and is taken over")
        return self._remove(there)

    def _remove(self, text: str) -> None:
        if self._read() == text:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._is_over.wait(self._seconds / _BEATS):
            with contextlib.suppress(OSError):  # try again at the next beat
                holder = _parse(self._read())
                if holder and holder.get("holder") != self._name["holder"]:
                    words = f"{self._field} {self._folder} was taken over by {_describe(holder)}"
                    _say(f"{words}: this process did not renew its lease for {self._seconds:.0f} s, and ends")
                    self._is_over.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._name["beat"] += 1
                write_atomically(self._path, self._text())


def release_now(lock: Lock) -> None:
    """Release a lock before the process is left abruptly: a store that does not answer holds nobody up for long."""
    thread = threading.Thread(target=lock.release, daemon=True)
    thread.start()
    thread.join(_LEAVE_S)


def _lease_seconds() -> float:
    text = os.environ.get(SECONDS_VARIABLE, str(DEFAULT_S))
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 3600:
            return seconds
    expected = "a number of seconds above 0, at most 3600"
    message = f"{SECONDS_VARIABLE} must be {expected}, got {text!r}"
    raise InputError(message, field=SECONDS_VARIABLE, given=text, expected=expected)


def _own_name() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _start_of(pid), "machine": _machine()}


def _machine() -> str:
    """Return what processes that see one another by process id have in common, "" if that is unknown."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_of(pid: int) -> str:
    """Return when a process began, in ticks since the machine's start; "" if it no longer runs."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether a holder is certainly gone: it ran on this machine and runs no longer."""
    is_here = holder.get("machine") == _machine() != ""
    return is_here and isinstance(holder.get("pid"), int) and _start_of(holder["pid"]) != holder.get("started")


def _parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        return content if isinstance(content, dict) else {}
    return {}


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"


def _refuse(folder: Path, field: str, holder: dict[str, Any]) -> InputError:
    words = f"{field} {folder} is in use by another run" + (f", {_describe(holder)}" if holder else "")
    return InputError(words, field=field, given=str(folder), expected="a directory that no other run uses")


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
