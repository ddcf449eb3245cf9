"""Paths as users name them: of this machine's file systems, or of an object store such as gs://bucket/run."""

import importlib.util
import os
import re
from pathlib import Path

from mvar_jax.errors import InputError, shorten, show

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_reached: set[str] = set()  # buckets that have answered this process


def scheme_of(path: str | os.PathLike) -> str | None:
    """Return "gs" for gs://bucket/run, None for a path of this machine's file systems."""
    match = _SCHEME.match(os.fspath(path))
    return match[1].lower() if match else None


def is_store(path: str | os.PathLike) -> bool:
    """Return whether a path names an object store."""
    return scheme_of(path) is not None


def as_path(text: str | os.PathLike, field: str = "path") -> Path:
    """Return the path that `text` names: a `pathlib.Path`, or a `StorePath`, which has the same methods.

    A path that pathlib has seen, such as gs:/bucket/run, names the store too.

    Args:
      text: what the user gave.
      field: name of the option, for the error.

    Raises:
      InputError: the scheme is unknown, its package is missing, there is no bucket, or the store does not answer.
    """
    if not isinstance(text, str | os.PathLike):
        raise InputError(f"{field} must be a path, got {show(text)}", field=field, given=text, expected="a path")
    if os.fspath(text) == "":  # of an unset variable; it would be the current folder
        raise InputError(f"{field} must be a path, got ''", field=field, given="", expected="a path")
    scheme = scheme_of(text)
    if scheme is None:
        return Path(text)
    from mvar_jax.files.stores import EXTRAS, STORES, StorePath

    given = os.fspath(text)
    if scheme not in STORES:
        expected = "a path of this machine, " + " or ".join(f"{name}://BUCKET/..." for name in STORES)
        raise InputError(f"{field} must be {expected}, got {given!r}", field=field, given=given, expected=expected)
    package = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        extra = EXTRAS[scheme]
        message = f"{field}={given} needs the package {package}, the extra {extra}: "
        message += f'pip install ".[{extra}]" in the checkout'
        raise InputError(message, field=field, given=given, expected=f"{package} to be installed")
    bucket, _, rest = _SCHEME.sub("", given, count=1).partition("/")
    if not bucket:
        expected = f"{scheme}://BUCKET/..."
        raise InputError(f"{field} must be {expected}, got {given!r}", field=field, given=given, expected=expected)
    path = StorePath(f"{scheme}://{bucket}/{rest}")
    _check_reached(path, field)
    return path


def local_path(text: str | os.PathLike, field: str, reason: str) -> Path:
    """Return a path of this machine's file systems.

    Raises InputError for a store. reason: why it must be local, as a sentence's second half.
    """
    if is_store(text):
        expected = f"a path of this machine's file systems, since {reason}"
        message = f"{field} must be {expected}, got {os.fspath(text)!r}"
        raise InputError(message, field=field, given=os.fspath(text), expected=expected)
    return Path(text)


def _check_reached(path, field: str) -> None:
    """Ask the store for the path once in this process for every bucket, so that typing errors show at once."""
    bucket = "//".join(path.parts[:2])
    if bucket in _reached:
        return
    try:
        path.exists()
    except OSError as error:
        message = f"{field}={path} cannot be reached: {shorten(error)}"
        raise InputError(message, field=field, given=str(path), expected="a store that answers") from error
    _reached.add(bucket)
