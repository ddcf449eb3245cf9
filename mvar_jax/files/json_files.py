"""Reading of JSON files, each checked against the type that it must have."""

import json
from pathlib import Path
from typing import Any

from mvar_jax.schema import conform


def read_json(path: Path, kind: Any) -> Any:
    """Return the content of a JSON file, which must be of a type that `schema.conform` knows.

    Raises OSError if the file cannot be read, ValueError if it is no JSON, InputError if it is of another type.
    """
    return conform(parse_json(path.read_text(encoding="utf-8")), kind, path.name)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is none, or too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None
