"""Features of an image set in a folder, part by part: resumable, and shared by several processes.

A part is the features of consecutive images, 20 kB an image. All scores are computed from the parts in their order,
so they depend neither on interruptions nor on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.evaluation.features import FeatureExtractor
from mvar_jax.evaluation.inception import NUM_CLASSES, POOL_WIDTH, SPATIAL_WIDTH, Features
from mvar_jax.evaluation.moments import Moments, RunningMoments
from mvar_jax.files.npz import is_whole_npz, save_npz
from mvar_jax.files.npz_reader import NpzFile

PART_IMAGES = 1024
WIDTHS = Features(POOL_WIDTH, SPATIAL_WIDTH, NUM_CLASSES)


@dataclass(frozen=True)
class FeatureFolder:
    """The parts of one image set.

    Attributes:
      path: the folder, which must exist; see `processes.holding.owned_folder` for who may write there.
      num_images: images of the set.
    """

    path: Path
    num_images: int

    @property
    def num_parts(self) -> int:
        return -(-self.num_images // PART_IMAGES)

    def rows(self, part: int) -> range:
        """Return the numbers of a part's images."""
        return range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, self.num_images))

    def find_missing(self, parts: Iterable[int]) -> list[int]:
        """Return those of the parts that are not there whole; every byte of a part is checked."""
        return [part for part in parts if not self._has(part)]

    def _has(self, part: int) -> bool:
        if not is_whole_npz(self._file(part), Features._fields):
            return False
        try:
            with NpzFile("features", self._file(part)) as file:
                for name, width in zip(Features._fields, WIDTHS, strict=True):
                    file.header(name, (len(self.rows(part)), width), "f")
        except InputError:
            return False
        return True

    def fill(
        self,
        extractor: FeatureExtractor,
        read_images: Callable[[range], np.ndarray],
        parts: Iterable[int],
        reads_ahead: bool = True,
    ) -> None:
        """Compute parts.

        Args:
          read_images: numbers -> pixels `[n, Y, X, 3] uint8`.
          reads_ahead: see `FeatureExtractor.stream`.
        """
        for part in parts:
            rows, size = self.rows(part), extractor.batch_size
            batches = (read_images(rows[i : i + size]) for i in range(0, len(rows), size))
            found = zip(*extractor.stream(batches, reads_ahead), strict=True)
            save_npz(self._file(part), **dict(zip(Features._fields, map(np.concatenate, found), strict=True)))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield `pool`, `spatial` or `probabilities` of each part in order. Raises InputError if one is missing."""
        width = getattr(WIDTHS, name)
        for part in range(self.num_parts):
            with NpzFile("features", self._file(part)) as file:
                yield file.read(name, (len(self.rows(part)), width))

    def array(self, name: str, numbers_n: np.ndarray | None = None) -> np.ndarray:
        """Return the features of the images with these ascending numbers, `[n, D] float32`; by default of all."""
        numbers_n = np.arange(self.num_images) if numbers_n is None else numbers_n
        found = np.empty((len(numbers_n), getattr(WIDTHS, name)), np.float32)
        for part, rows in enumerate(self.parts(name)):
            first = part * PART_IMAGES
            begin, end = np.searchsorted(numbers_n, (first, first + len(rows)))
            found[begin:end] = rows[numbers_n[begin:end] - first]
        return found

    def moments(self, name: str) -> Moments:
        """Return the moments of the features of all images."""
        running = RunningMoments()
        for rows in self.parts(name):
            running.add(rows)
        return running.moments()

    def _file(self, part: int) -> Path:
        return self.path / f"{part:06d}.npz"
