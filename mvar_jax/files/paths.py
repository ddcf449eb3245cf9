"""Paths as users name them: of this machine's file systems, or of an object store such as gs://bucket/run."""

import os
import re
from pathlib import Path

from mvar_jax.errors import InputError

# scheme -> the package through which etils.epath reaches the store
STORES = {"gs": "gcsfs", "s3": "s3fs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def scheme_of(path: str | os.PathLike) -> str | None:
    """Return "gs" for gs://bucket/run, None for a path of this machine's file systems."""
    match = _SCHEME.match(os.fspath(path))
    return match[1].lower() if match else None


def as_path(text: str | os.PathLike, field: str = "path") -> Path:
    """Return the path that `text` names: a `pathlib.Path`, or an `etils.epath.Path` of an object store.

    Both have the same methods. Raises InputError for a scheme that is unknown or whose package is missing.
    """
    scheme = scheme_of(text)
    if scheme is None:
        return Path(text)
    if scheme not in STORES:
        expected = "a path of this machine, " + " or ".join(f"{name}://BUCKET/..." for name in STORES)
        raise InputError(
            f"{field} must be {expected}, got {os.fspath(text)!r}", field=field, given=str(text), expected=expected
        )
    _check_package(scheme, text, field)
    from etils import epath

    return epath.Path(text)


def _check_package(scheme: str, text: str | os.PathLike, field: str) -> None:
    import importlib.util

    package = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        message = f"{field}={os.fspath(text)} needs the package {package}; pip install {package}"
        raise InputError(message, field=field, given=str(text), expected=f"{package} to be installed")
