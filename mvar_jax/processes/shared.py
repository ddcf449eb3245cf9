"""Shared storage is checked, not assumed: every process must see what the first one writes."""

import contextlib
import secrets
import socket
import time
from pathlib import Path

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.processes import group
from mvar_jax.processes.patience import read_seconds

SECONDS_VARIABLE = "MVAR_SHARED_SECONDS"
DEFAULT_S = 20.0
_POLL_S = 0.2


def check_shared(field: str, path: Path) -> None:
    """Make the directory `path` and check that all processes of the run share it.

    The first process writes a file with a random name there, and every other one must find it within 20 s, or
    MVAR_SHARED_SECONDS. A run of one process makes nothing.

    Raises InputError in every process if one does not find the file, or if the first cannot write.
    """
    here = group.current()
    if here.count == 1:
        return
    seconds = read_seconds(SECONDS_VARIABLE, DEFAULT_S, 3600)
    is_new = here.index == 0 and not path.exists()
    name = _write_mark(field, path) if here.index == 0 else None
    name = here.gather(f"the mark in {field}", name)[0]
    is_seen = _sees(path / name, seconds)
    found = here.gather(f"the sight of {field}", [is_seen, socket.gethostname()])
    blind = [index for index, (is_there, _) in enumerate(found) if not is_there]
    if here.index == 0:
        with contextlib.suppress(OSError):
            (path / name).unlink()
            if blind and is_new:
                path.rmdir()
    if blind:
        hosts = f"process {blind[0]} of {here.count}, on {found[blind[0]][1]}, does not see what process 0, on "
        words = f"{field} {path} must be on storage that all processes share: {hosts}{found[0][1]}, wrote there"
        raise InputError(words, field=field, given=str(path), expected="a directory that all processes share")


def _write_mark(field: str, path: Path) -> str:
    name = f".shared-{secrets.token_hex(8)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / name, "")
    except OSError as error:
        words = f"{field} {path} cannot be written: {shorten(error)}"
        raise InputError(words, field=field, given=str(path), expected="a writable directory") from None
    return name


def _sees(mark: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if mark.exists():
                return True
        time.sleep(_POLL_S)
    return False
