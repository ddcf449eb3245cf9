"""Files of JSON lines that grow: appended to on a disk, written in pieces to an object store.

An object cannot be appended to. There, the lines are in the pieces NAME.jsonl, NAME-0001.jsonl, ...: the last one is
written again as it grows, and the next one follows when it is large. When the writer is closed, all pieces are joined
to NAME.jsonl. A kill between writing it and removing the others leaves lines twice; readers drop them.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mvar_jax.errors import shorten
from mvar_jax.files.atomic import sync, write_atomically
from mvar_jax.files.json_files import parse_json
from mvar_jax.files.paths import is_store
from mvar_jax.schema import conform

PIECE_BYTES = 2**20
UPLOAD_S = 10.0


class Lines(Protocol):
    """An open file of lines."""

    def write(self, content: Any) -> None:
        """Add a line."""

    def flush(self) -> None:
        """Return when every line so far is on the disk or in the store. Raises OSError if that fails."""

    def close(self) -> None:
        """Flush and close."""


def read_lines(path: Path) -> list[Any]:
    """Return the contents of all whole lines, oldest first, [] without such a file; a kill may have cut a line."""
    return [content for _, content in _parse(_texts_of(path))]


def open_lines(path: Path, is_kept: Callable[[Any], bool]) -> Lines:
    """Open a file to add lines, after dropping those whose content `is_kept` denies, and cut ones."""
    pieces = _pieces_of(path)
    texts = _texts_of(path)
    kept = [text for text, content in _parse(texts) if is_kept(content)]
    # a disk's file always, since a kill may have cut no more than the last newline
    if pieces and (kept != texts or pieces != [path] or not is_store(path)):
        _replace(path, kept, pieces)
    return _StoredLines(path, kept) if is_store(path) else _AppendedLines(path)


class _AppendedLines:
    def __init__(self, path: Path):
        self._path, self._file = path, path.open("a")

    def write(self, content: Any) -> None:
        with self._naming():
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()

    def flush(self) -> None:
        with self._naming():
            self._file.flush()
            sync(self._path)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Let an error of a full disk name the file."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        self._file.close()


class _StoredLines:
    """Lines in an object store, uploaded by a thread so that nobody waits for it, except `flush`."""

    def __init__(self, path: Path, lines: list[str]):
        self._path, self._number = path, 0
        self._lines, self._has_new = list(lines), False
        if sum(map(len, lines)) >= PIECE_BYTES:
            self._lines, self._number = [], 1
        self._guard, self._upload = threading.Lock(), threading.Lock()
        self._is_closed, self._is_failing = threading.Event(), False
        self._thread = threading.Thread(target=self._upload_often, name="lines", daemon=True)
        self._thread.start()

    def write(self, content: Any) -> None:
        with self._guard:
            self._lines.append(json.dumps(content))
            self._has_new = True

    def flush(self) -> None:
        with self._upload:
            with self._guard:
                lines, is_due = list(self._lines), self._has_new
                self._has_new = False
            if not is_due:
                return
            text = _join(lines)
            try:
                write_atomically(_piece(self._path, self._number), text)
            except BaseException:
                self._has_new = True
                raise
            if len(text) >= PIECE_BYTES:
                with self._guard:
                    self._lines, self._number = self._lines[len(lines) :], self._number + 1

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()
        self.flush()
        pieces = _pieces_of(self._path)
        if len(pieces) > 1:
            _replace(self._path, [text for text, _ in _parse(_texts_of(self._path))], pieces)

    def _upload_often(self) -> None:
        while not self._is_closed.wait(UPLOAD_S):
            try:
                self.flush()
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    with contextlib.suppress(OSError, ValueError):
                        line = f"{self._path} cannot be written at the moment: {shorten(error)}"
                        print(line, file=sys.stderr, flush=True)
                self._is_failing = True


def _piece(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number:04d}{path.suffix}") if number else path


def _pieces_of(path: Path) -> list[Path]:
    """Return the existing pieces in order."""
    first = [path] if path.is_file() else []
    return first + (sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}")) if is_store(path) else [])


def _texts_of(path: Path) -> list[str]:
    # a damaged line that is no UTF-8 is no JSON either, so `_parse` drops it alone
    decode = lambda content: content.decode("utf-8", errors="surrogateescape")
    texts = [text for piece in _pieces_of(path) for text in decode(piece.read_bytes()).splitlines()]
    return list(dict.fromkeys(texts)) if is_store(path) else texts


def _parse(texts: Iterable[str]) -> Iterable[tuple[str, Any]]:
    for text in texts:
        with contextlib.suppress(ValueError):
            text.encode()
            yield text, conform(parse_json(text), dict[str, Any], "a line")


def _replace(path: Path, lines: list[str], pieces: list[Path]) -> None:
    """Make the lines the content of the first piece, and remove the others."""
    write_atomically(path, _join(lines))
    for piece in pieces:
        if piece != path:
            piece.unlink(missing_ok=True)


def _join(lines: list[str]) -> str:
    return "".join(text + "\n" for text in lines)
