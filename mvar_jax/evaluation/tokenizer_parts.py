"""Scores of a tokenizer in a folder, part by part: resumable, and shared by several processes.

A part holds the scores of consecutive images and, for rFID, their features: 8 kB for each of two images. Results are
computed from the parts in their order, so they depend neither on interruptions nor on the number of processes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.skipped import SkippedImage
from mvar_jax.errors import InputError, RunError
from mvar_jax.evaluation.image_sets import ImageSet
from mvar_jax.evaluation.network_files import read_json_array
from mvar_jax.evaluation.tokenizer_scores import HITS, PER_IMAGE, TokenizerScorer, Totals, frechet_to_originals
from mvar_jax.files.npz import is_whole_npz, save_npz
from mvar_jax.files.npz_reader import NpzFile

PART_IMAGES = 256
BAD = "bad"  # the array with a line of JSON: the images that could not be used


@dataclass(frozen=True)
class PartFolder:
    """The parts of one image set.

    Attributes:
      path: the folder; see `processes.holding.owned_folder` for who may write there.
    """

    path: Path
    images: ImageSet
    scorer: TokenizerScorer

    @property
    def num_parts(self) -> int:
        return -(-len(self.images) // PART_IMAGES)

    def rows(self, part: int) -> range:
        """Return the numbers of a part's images."""
        return range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, len(self.images)))

    def find_missing(self, parts: range) -> list[int]:
        """Return those of the parts that are not there whole."""
        return [part for part in parts if not self._has(part)]

    def fill(self, missing: list[int], on_image: Callable[[], None]) -> None:
        """Compute parts. on_image: called after each image; what it raises ends the work, and finished parts stay."""
        numbers = [number for part in missing for number in self.rows(part)]
        with contextlib.closing(self.images.stream(numbers)) as loaded:
            for part in missing:
                bad: list[SkippedImage] = []
                arrays = self.scorer.score(self._good(zip(self.rows(part), loaded, strict=False), bad, on_image))
                save_npz(self._file(part), **arrays, **{BAD: np.array([json.dumps(bad)])})

    def scores(self) -> dict[str, Any]:
        """Return the scores of all images, see `Totals.scores`, `rfid` and `skipped`.

        Raises InputError if a part is missing, RunError if no image could be used.
        """
        totals, skipped = Totals(self.scorer.scales, self.scorer.tokenizer.sides), []
        for part in range(self.num_parts):
            with self._open(part) as file:
                totals.add({name: self._read(file, name) for name in (HITS, *PER_IMAGE)})
                skipped += read_json_array(file, BAD, list[SkippedImage])
        if totals.num_images == 0:
            last = f"{skipped[-1]['name']}: {skipped[-1]['reason']}"
            raise RunError(f"no image can be used any more; the last is {last}")
        scores, names = totals.scores(), self.scorer.feature_names()
        distances = frechet_to_originals(names, self._rows_of) if names and totals.num_images > 1 else {}
        for entry, name in zip(scores["by_scale"], self.scorer.scale_names(), strict=True):
            entry["rfid"] = distances.get(name)
        return {"rfid": scores["by_scale"][-1]["rfid"], **scores, "skipped": skipped}

    def _good(self, loaded: Iterator, bad: list[SkippedImage], on_image: Callable[[], None]) -> Iterator[np.ndarray]:
        """Yield the pixels of the images that can be used; list the others."""
        for number, pixels in loaded:
            if isinstance(pixels, str):
                bad.append({"number": number, "name": self.images.name_of(number), "reason": pixels})
            else:
                yield pixels
            on_image()

    def _has(self, part: int) -> bool:
        """Return whether a part is there whole; every byte is checked."""
        shapes = self.scorer.array_shapes()
        if not is_whole_npz(self._file(part), (*shapes, BAD)):
            return False
        try:
            with self._open(part) as file:
                for name, shape in shapes.items():
                    file.header(name, shape, "fi")
        except InputError:
            return False
        return True

    def _rows_of(self, name: str) -> Iterator[np.ndarray]:
        for part in range(self.num_parts):
            with self._open(part) as file:
                yield self._read(file, name)

    def _read(self, file: NpzFile, name: str) -> np.ndarray:
        return file.read(name, self.scorer.array_shapes()[name], "fi")

    def _open(self, part: int) -> NpzFile:
        return NpzFile("parts", self._file(part))

    def _file(self, part: int) -> Path:
        return self.path / f"{part:06d}.npz"
