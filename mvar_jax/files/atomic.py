"""Atomic writes: readers see the old file or the whole new one, never a part.

A disk renames a finished temporary file; an object store has no rename, but one upload is atomic. File and folder are
synced, so that a file counts only once it also survives a power cut.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvar_jax.errors import STORAGE_ERRORS
from mvar_jax.files.paths import as_path, is_store

NAME_BYTES = 255  # the longest name of a file on the usual file systems

_OLD = ".old"  # ends the name of a directory that is being replaced
_TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9_-]+-)?\d+\.tmp")  # of `temporary_path`; of older versions: without a host


def temporary_path(path: Path) -> Path:
    """Return the name under which `path` is written first: hidden, in the same folder, with host and process id."""
    host = re.sub(r"[^A-Za-z0-9_]+", "-", socket.gethostname())[:63]
    end = f".{host}-{os.getpid()}.tmp"
    return path.with_name(f".{fit_name(path.name, NAME_BYTES - 1 - len(end))}{end}")


def fit_name(name: str, num_bytes: int) -> str:
    """Return a name in UTF-8 of at most so many bytes: the name itself, or its beginning and a digest of it."""
    data = os.fsencode(name)
    if len(data) <= num_bytes and data.decode(errors="ignore") == name:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: num_bytes - 9].decode(errors='ignore')}-{digest}"


def sync(path: Path) -> None:
    """Return when a file or the names in a folder are on the disk itself, if its file system can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder of this machine and all that is in it."""
    for top, _, files in os.walk(folder):
        for path in (*(os.path.join(top, name) for name in files), top):
            sync(Path(path))


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of unfinished writes to `folder`/`name`; a pattern, by default of all names.

    An old directory whose new one was not yet in its place is put back (`replace_directory`). Call it only while no
    process writes there. What cannot be removed stays, since it harms nothing.
    """
    if is_store(folder):
        return  # unfinished uploads are no objects
    for path in folder.glob(f".{name}.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            with contextlib.suppress(OSError):
                _put_back(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def replace_directory(fresh: Path, path: Path) -> None:
    """Put a finished directory of this machine in the place of `path`.

    No call does this at once: after a kill in between, `find_replaced` returns the old directory.
    """
    old = temporary_path(path.with_name(f"{path.name}{_OLD}"))
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_replaced(path: Path) -> Path:
    """Return the old directory of a `replace_directory` that was killed in between, else `path` itself."""
    if path.exists():
        return path
    return next((old for old in path.parent.glob(f".{glob.escape(path.name)}{_OLD}.*.tmp") if old.is_dir()), path)


def _put_back(old: Path) -> None:
    name, is_old, _ = old.name.removeprefix(".").rpartition(f"{_OLD}.")
    if is_old and not (place := old.with_name(name)).exists():
        os.replace(old, place)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path of this machine. It replaces `path` if the block succeeds, else it is removed.

    Missing parent folders are made. An OSError of a full disk, or of the temporary file, names `path`.
    """
    path = as_path(path)
    if is_store(path):
        with tempfile.TemporaryDirectory(prefix="mvar_") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.upload(temporary)  # type: ignore[attr-defined]
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename == str(temporary) or (error.filename is None and error.errno in STORAGE_ERRORS):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file. Text is encoded as UTF-8, with escapes for what names of files hold beyond it."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    path = as_path(path)
    if is_store(path):
        path.write_bytes(data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON that ends with a newline."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")
