"""Images that cannot be used: they are skipped and listed by name, and too many of them end the run."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_json
from mvar_jax.files.json_files import read_json


class SkippedImage(TypedDict):
    """An image that cannot be used."""

    number: int
    name: str
    reason: str


class SkippedFile(TypedDict):
    """The file of a list, as far as the list is read from it."""

    skipped: list[SkippedImage]


class Skipped:
    """The bad images of one split, by their names.

    Args:
      split: name of the split.
      num_images: number of images in it.
      max_bad_share: largest share of them that may be bad.
    """

    def __init__(self, split: str, num_images: int, max_bad_share: float):
        self.split, self.num_images, self.max_bad_share = split, num_images, max_bad_share
        self.max_bad = math.floor(max_bad_share * num_images)
        self._entries: dict[str, dict[str, Any]] = {}
        self._file: Path | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[dict[str, Any]]:
        """Return `{"number", "name", "reason"}` of every bad image so far, by number."""
        return sorted(self._entries.values(), key=lambda entry: entry["number"])

    def keep_in(self, file: Path, is_bad: Callable[[dict[str, Any]], bool]) -> None:
        """Continue the list in `file`, if it exists, and keep the file up to date from now on.

        The file is not made before the first bad image.

        Args:
          file: JSON file of the list.
          is_bad: whether the image of an entry is still bad; asked if the list has more of them than allowed.

        Raises:
          InputError: the list has more bad images than allowed.
        """
        with contextlib.suppress(OSError, ValueError):
            for entry in read_json(file, SkippedFile)["skipped"]:
                self._entries[entry["name"]] = {key: entry[key] for key in ("number", "name", "reason")}
        self._file = file
        if len(self) > self.max_bad:
            self._entries = {name: entry for name, entry in self._entries.items() if is_bad(entry)}
            self._write()
            self._check()

    def add(self, number: int, name: str, reason: str) -> None:
        """List an image. Raises InputError if more images are bad than allowed."""
        if name in self._entries:
            return
        self._entries[name] = {"number": number, "name": name, "reason": reason}
        self._write()
        self._check()

    def _check(self) -> None:
        if len(self) > self.max_bad:
            last = list(self._entries.values())[-1]
            allowed = f"at most {self.max_bad} of {self.num_images} {self.split} images"
            raise InputError(
                f"{len(self)} bad images, but data.max_bad_share={self.max_bad_share} allows {allowed}; "
                f"the last is {last['name']}: {last['reason']}",
                field="bad images",
                given=len(self),
                expected=allowed,
            )

    def _write(self) -> None:
        if self._file is not None:
            content = {"split": self.split, "num_images": self.num_images, "skipped": self.entries()}
            write_json(self._file, content)
