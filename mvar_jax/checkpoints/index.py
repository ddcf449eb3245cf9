"""The index of a folder of arrays: what is in it. It is written last, so a folder that has one is complete.

Two lines of JSON: the content, and the checksum of the first line.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from mvar_jax.checkpoints.arrays import Layout
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import write_atomically

INDEX_FILE = "checkpoint.jsonl"
FORMAT = 2  # 1 was Orbax's: see orbax_format.py

Keys = tuple[str | int, ...]


class DamagedError(InputError):
    """A checkpoint whose files are not what was written: an older one may be good."""


class Index(NamedTuple):
    """Content of the index.

    items: name of a tree -> keys from its root to a leaf -> layout. meta: any JSON object.
    """

    items: dict[str, dict[Keys, Layout]]
    meta: dict[str, Any]


def write_index(folder: Path, index: Index) -> None:
    """Write the index atomically: the folder is complete now."""
    items = {name: [[keys, layout] for keys, layout in leaves.items()] for name, leaves in index.items.items()}
    line = json.dumps({"format": FORMAT, "meta": index.meta, "items": items})
    write_atomically(folder / INDEX_FILE, f"{line}\n{json.dumps({'crc32': zlib.crc32(line.encode())})}\n")


def read_index(folder: Path) -> Index:
    """Return the index of a folder. Raises DamagedError if it is missing or not what was written."""
    try:
        line, end = (folder / INDEX_FILE).read_bytes().decode().splitlines()
        if json.loads(end) != {"crc32": zlib.crc32(line.encode())}:
            raise damaged(folder, f"{INDEX_FILE} is damaged")
        content = json.loads(line)
    except FileNotFoundError:
        raise damaged(folder, f"{INDEX_FILE} is missing") from None
    except OSError as error:
        raise unreadable(folder, f"{INDEX_FILE}: {shorten(error)}") from error
    except InputError:
        raise
    except (ValueError, TypeError):
        raise damaged(folder, f"{INDEX_FILE} is damaged") from None
    if content["format"] != FORMAT:
        raise unreadable(folder, f"it has format {content['format']}; this version reads format {FORMAT}")
    items = {
        name: {tuple(keys): _layout(*layout) for keys, layout in leaves} for name, leaves in content["items"].items()
    }
    return Index(items, content["meta"])


def damaged(folder: Path, reason: str) -> DamagedError:
    """Return the error of a damaged checkpoint, which says why in a few words."""
    return DamagedError(_sentence(folder, reason), **_fields(folder))


def unreadable(folder: Path, reason: str) -> InputError:
    """Return the error of a checkpoint that cannot be read or does not fit, damaged or not."""
    return InputError(_sentence(folder, reason), **_fields(folder))


def _sentence(folder: Path, reason: str) -> str:
    return f"checkpoint {folder} cannot be read: {reason}"


def _fields(folder: Path) -> dict[str, Any]:
    return {"field": "checkpoint", "given": str(folder), "expected": "a readable checkpoint of this model"}


def _layout(dtype: str, *shapes: list[int]) -> Layout:
    return Layout(dtype, *(tuple(shape) for shape in shapes))
