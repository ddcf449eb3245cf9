"""Atomic writes: readers see the old file or the whole new one, never a part."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # of `temporary_path`


def temporary_path(path: Path) -> Path:
    """Return the name under which `path` is written first: hidden, in the same folder, with the process id."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of unfinished writes to `folder`/`name`; a pattern, by default of all names.

    Call it only while no process writes there. What cannot be removed stays, since it harms nothing.
    """
    for path in folder.glob(f".{name}.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path. It replaces `path` if the block succeeds and is removed if the block raises.

    Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file. Text is encoded as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON that ends with a newline."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")
