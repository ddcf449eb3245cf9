"""Folders and files of an object store, with the methods of `pathlib.Path`.

`etils.epath` has such paths, but reaches a store through TensorFlow's file systems if TensorFlow is installed (which
know no s3:// and no emulator) and through fsspec if not, makes a path of this machine of what it calls absolute, and
keeps listings that another process has outdated. Ours always goes through fsspec and is registered with epath, so
that Orbax and JAX get it too.
"""

import contextlib
import errno
import functools
import glob
import io
import logging
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import stat_utils

from mvar_jax.errors import shorten

# scheme -> the package through which fsspec reaches the store
STORES = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "gcs", "s3": "s3"}  # of this package, which install them
# packages whose exceptions mean that a store did not do what it was asked for
_STORE_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs"}


@functools.cache
def filesystem(scheme: str) -> Any:
    """Return the one connection of this process to a kind of store."""
    import fsspec  # slow to import

    # the library prints tracebacks of every failed try; its errors reach us anyway
    logging.getLogger(STORES[scheme]).addHandler(logging.NullHandler())
    # botocore's 10 connections are few for the records of a batch, read one by one
    options = {"config_kwargs": {"max_pool_connections": 64}} if scheme == "s3" else {}
    connection = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    connection.loop.set_exception_handler(_note_lost_error)
    return connection


def _note_lost_error(_: Any, context: dict[str, Any]) -> None:
    """Log the error of a task that nobody waits for at debug level: the request that began it has raised already."""
    logging.debug("%s: %r", context["message"], context.get("exception"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=filesystem.cache_clear)  # a connection does not survive a fork


def is_store_error(error: BaseException) -> bool:
    """Return whether an exception comes from a store's library: no credentials, no connection, refused."""
    return type(error).__module__.partition(".")[0] in _STORE_LIBRARIES


@contextlib.contextmanager
def _as_os_errors(path: "StorePath") -> Iterator[None]:
    """Raise what the store's library raises as OSError."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # built from a message alone
            number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno or errno.EIO
            raise type(error)(number, shorten(error), str(path)) from error
        raise
    except Exception as error:
        if not is_store_error(error):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {shorten(error)}", str(path)) from error


class StoreStat(stat_utils.StatResult):
    """Size and time of an object, by the names of `os.stat_result`."""

    @property
    def st_size(self) -> int:
        return self.length

    @property
    def st_mtime_ns(self) -> int:
        return int(self.mtime * 1e9)


@epath.register_path_cls([f"{scheme}://" for scheme in STORES])
class StorePath(epath.Path):
    """A path of an object store, such as gs://bucket/run/config.json.

    A folder exists while an object has its name as prefix; it is neither made nor renamed. An object appears whole or
    not at all. What a store's library raises is raised as OSError.
    """

    def __str__(self) -> str:
        scheme, *rest = self.parts or (".",)
        return f"{scheme}//{'/'.join(rest)}" if scheme.endswith(":") else "/".join([scheme, *rest])

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def as_uri(self) -> str:
        """Return the path itself."""
        return str(self)

    @property
    def _fs(self) -> Any:
        return filesystem(self.parts[0].removesuffix(":"))

    def _like(self, name: str) -> "StorePath":
        """Return the path of an object as fsspec names it, without the scheme."""
        return type(self)(f"{self.parts[0]}//{name.rstrip('/')}")

    def _info(self) -> dict[str, Any] | None:
        with _as_os_errors(self), contextlib.suppress(FileNotFoundError):
            return self._fs.info(str(self))
        return None

    def exists(self) -> bool:
        """Return whether there is such an object or folder."""
        return self._info() is not None

    def is_dir(self) -> bool:
        """Return whether an object has this path as its folder."""
        return (self._info() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        return (self._info() or {}).get("type") == "file"

    def stat(self) -> StoreStat:
        """Return size and time."""
        with _as_os_errors(self):
            info = self._fs.info(str(self))
            is_directory = info["type"] == "directory"
            time_s = 0.0 if is_directory else self._fs.modified(str(self)).timestamp()
        return StoreStat(is_directory, info["size"], time_s, None, None, None)

    def iterdir(self) -> Iterator["StorePath"]:
        """Yield what lies in the folder. Raises FileNotFoundError if nothing does."""
        with _as_os_errors(self):
            names = self._fs.ls(str(self), detail=False)
        own = str(self).partition("://")[2].rstrip("/")
        yield from (self._like(name) for name in names if name.rstrip("/") != own)

    def list_folders(self) -> list[str]:
        """Return the sorted names of the folders in this one. Raises FileNotFoundError if nothing lies in it."""
        with _as_os_errors(self):
            entries = self._fs.ls(str(self), detail=True)
        return sorted(posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] != "file")

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """Yield the paths below that match."""
        with _as_os_errors(self):
            names = self._fs.glob(posixpath.join(glob.escape(str(self)), pattern))
        yield from map(self._like, names)

    def find(self) -> list[str]:
        """Return the names of all objects below, relative to this folder, in order; one request for every 1,000."""
        return list(self.find_sizes())

    def find_sizes(self) -> dict[str, int]:
        """Return the name and the size in bytes of every object below, as `find`."""
        with _as_os_errors(self):
            found = self._fs.find(str(self), detail=True)
        start = len(str(self).partition("://")[2].rstrip("/")) + 1
        sizes = {name[start:]: info["size"] for name, info in found.items() if not name.endswith("/")}
        return dict(sorted(sizes.items()))

    def walk(self, *, top_down: bool = True, on_error=None) -> Iterator[tuple["StorePath", list[str], list[str]]]:
        """Yield (folder, names of folders, names of files), as `pathlib.Path.walk`."""
        with _as_os_errors(self):
            steps = list(self._fs.walk(str(self), topdown=top_down))
        yield from ((self._like(top), sorted(folders), sorted(files)) for top, folders, files in steps)

    def resolve(self, strict: bool = False) -> "StorePath":
        """Return the path itself: every path of a store is absolute."""
        return self

    absolute = expanduser = resolve

    def is_absolute(self) -> bool:
        """Return True."""
        return True

    def open(self, mode: str = "r", **options) -> Any:
        """Open an object to read it (in parts, as asked for), or to write it whole when the file is closed."""
        if mode == "rb":
            with _as_os_errors(self):
                return self._fs.open(str(self), "rb")
        if mode == "r":
            return io.StringIO(self.read_text())
        if mode in ("w", "wb"):
            upload = _Upload(self)
            return upload if mode == "wb" else io.TextIOWrapper(upload, "utf-8", write_through=True)
        raise io.UnsupportedOperation(f"an object of a store cannot be opened in mode {mode!r}")

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        with _as_os_errors(self):
            return self._fs.cat_file(str(self))

    def read_range(self, start: int, size: int) -> bytes:
        """Return part of the object."""
        with _as_os_errors(self):
            return self._fs.cat_file(str(self), start=start, end=start + size)

    def read_text(self, encoding: str | None = None) -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Write the object, whole or not at all."""
        with _as_os_errors(self):
            self._fs.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None, **_) -> int:
        """Write the object as text."""
        self.write_bytes(data.encode(encoding or "utf-8"))
        return len(data)

    def write_new(self, data: bytes) -> None:
        """Write the object unless it exists. Raises FileExistsError if it does.

        Of two processes that try at once a store without conditional writes may let both pass.
        """
        if self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        with _as_os_errors(self):
            self._fs.pipe_file(str(self), bytes(data), mode="create")

    def upload(self, file: Path) -> None:
        """Write the object from a file of this machine, whole or not at all."""
        with _as_os_errors(self):
            self._fs.put_file(str(file), str(self))

    def download(self, file: Path) -> None:
        """Write the object to a file of this machine."""
        with _as_os_errors(self):
            self._fs.get_file(str(self), str(file))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists as soon as an object lies in it. No bucket is ever made."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))

    def rmdir(self) -> None:
        """Do nothing: an empty folder does not exist."""

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects below."""
        with _as_os_errors(self), contextlib.suppress(*[FileNotFoundError] * missing_ok):
            self._fs.rm(glob.escape(str(self)), recursive=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
        with _as_os_errors(self), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(str(self))

    def rename(self, target: os.PathLike | str) -> "StorePath":
        """Copy an object or a folder and remove the original; a kill in between leaves both."""
        names = [f"/{name}" for name in self.find()] if self.is_dir() else [""]
        originals = [f"{self}{name}" for name in names]
        with _as_os_errors(self):  # by lists of objects: fsspec's own expansion of a folder takes folders for objects
            self._fs.copy(originals, [f"{os.fspath(target)}{name}" for name in names])
            self._fs.rm([glob.escape(name) for name in originals])
        return type(self)(target)

    replace = rename

    def copy(self, dst: os.PathLike | str, overwrite: bool = False) -> "StorePath":
        """Copy an object inside the store."""
        target = type(self)(dst)
        if not overwrite and target.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        with _as_os_errors(self):
            self._fs.cp_file(str(self), str(target))
        return target


class _Upload(io.BytesIO):
    """A file in memory that becomes an object when it is closed, unless its `with` block raises."""

    def __init__(self, path: StorePath):
        super().__init__()
        self._path: StorePath | None = path

    def __exit__(self, error_type, *_) -> None:
        if error_type is not None:
            self._path = None
        self.close()

    def close(self) -> None:
        if not self.closed and self._path is not None:
            self._path.write_bytes(self.getvalue())
        super().close()
