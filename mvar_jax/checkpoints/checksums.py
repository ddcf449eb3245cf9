"""Checksums of what neither Orbax nor the arrays' chunks check: the descriptions of trees, and a checkpoint's meta.

`checksums.jsonl` is two lines of JSON: the checksum of each file by its name, and the checksum of the first line.
Version 0.1 wrote `checksums.json`, which lists the arrays' files too.
"""

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.json_files import parse_json, read_json
from mvar_jax.schema import conform

_FILE = "checksums.jsonl"
_OLD_FILE = "checksums.json"
_PART_BYTES = 2**22


class DamagedError(InputError):
    """A checkpoint whose files are not what was written: an older one may be good."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files of a folder into it."""
    names = list(names)
    with ThreadPoolExecutor() as threads:
        values = threads.map(_checksum, [folder / name for name in names])
        line = json.dumps(dict(zip(names, values, strict=True)))
    write_atomically(folder / _FILE, f"{line}\n{json.dumps({'crc32': zlib.crc32(line.encode())})}\n")


def read_checksums(folder: Path) -> dict[str, int]:
    """Return file name -> checksum. Raises DamagedError if the list is missing or damaged."""
    try:
        try:
            line, end = (folder / _FILE).read_bytes().decode().splitlines()
        except FileNotFoundError:
            return read_json(folder / _OLD_FILE, dict[str, int])
        if parse_json(end) != {"crc32": zlib.crc32(line.encode())}:
            raise ValueError("another checksum")
        return conform(parse_json(line), dict[str, int], _FILE)
    except FileNotFoundError:
        raise damaged(folder, f"{_FILE} is missing") from None
    except OSError as error:
        raise unreadable(folder, f"{_FILE}: {shorten(error)}") from error
    except ValueError:
        raise damaged(folder, f"{_FILE} is damaged") from None


def check_files(folder: Path, item: str) -> None:
    """Check the listed files of an item; item "" is the whole folder.

    Raises InputError if there is no such item, DamagedError if a file is missing or changed.
    """
    prefix = f"{item}/" if item else ""
    values = {name: value for name, value in read_checksums(folder).items() if name.startswith(prefix)}
    if not values:
        raise unreadable(folder, f"it has no {item}")
    for name, value in values.items():
        try:
            is_whole = _checksum(folder / name) == value
        except FileNotFoundError:
            raise damaged(folder, f"{name} is missing") from None
        except OSError as error:
            raise unreadable(folder, f"{name}: {shorten(error)}") from error
        if not is_whole:
            raise damaged(folder, f"{name} is damaged")


def has_item(folder: Path, item: str) -> bool:
    """Return whether a checkpoint was written with an item of this name, even if the item is lost."""
    return any(name.startswith(f"{item}/") for name in read_checksums(folder))


def damaged(folder: Path, reason: str) -> DamagedError:
    """Return the error of a damaged checkpoint, which says why in a few words."""
    return DamagedError(_sentence(folder, reason), **error_fields(folder))


def unreadable(folder: Path, reason: str) -> InputError:
    """Return the error of a checkpoint that cannot be read or does not fit, damaged or not."""
    return InputError(_sentence(folder, reason), **error_fields(folder))


def error_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of an error about a checkpoint."""
    return {"field": "checkpoint", "given": str(folder), "expected": "a readable checkpoint of this model"}


def _sentence(folder: Path, reason: str) -> str:
    return f"checkpoint {folder} cannot be read: {reason}"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            value = zlib.crc32(part, value)
    return value
