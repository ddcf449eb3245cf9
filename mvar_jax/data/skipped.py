"""Images that could not be used: skipped, listed by name, and too many of them end the work."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_json


class Skipped:
    """The bad images of one split, by their numbers.

    num_images: of the split. max_bad_share: the largest share of them that may be bad.
    """

    def __init__(self, split: str, num_images: int, max_bad_share: float):
        if not 0 <= max_bad_share <= 1:
            raise InputError("data.max_bad_share", max_bad_share, "a share from 0 to 1")
        self.split, self.num_images, self.max_bad_share = split, num_images, max_bad_share
        self.max_bad = math.floor(max_bad_share * num_images)
        self._entries: dict[int, dict[str, Any]] = {}
        self._file: Path | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[dict[str, Any]]:
        """`{"number", "name", "reason"}` of every bad image so far, by number."""
        return [self._entries[number] for number in sorted(self._entries)]

    def keep_in(self, file: Path) -> None:
        """Goes on with the list in `file`, if it is there, and keeps it up to date from now on.

        Nothing is written before there is a bad image.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for entry in json.loads(file.read_text())["skipped"]:
                self._entries[int(entry["number"])] = entry
        self._file = file

    def add(self, number: int, name: str, reason: str) -> None:
        """Raises InputError at the first bad image above the allowed share."""
        if number in self._entries:
            return
        self._entries[number] = {"number": number, "name": name, "reason": reason}
        self._write()
        if len(self) > self.max_bad:
            of = f"{self.num_images} {self.split} images by data.max_bad_share={self.max_bad_share}"
            raise InputError("bad images", len(self), f"at most {self.max_bad} of {of}; the last is {name}: {reason}")

    def _write(self) -> None:
        if self._file is None or not self._entries:
            return
        content = {"split": self.split, "num_images": self.num_images, "skipped": self.entries()}
        write_json(self._file, content)
