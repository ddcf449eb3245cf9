"""What folders and tars share: images in files whose names, labels and sizes are known without reading them."""

import abc
import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mvar_jax.data.names import Names
from mvar_jax.data.protocols import ImageSource, digest

_MAX_NAMED = 5  # of each kind, in a note


class FileSource(ImageSource):
    """Images in files.

    Attributes:
      labels: class of each image, [N] int32.
    """

    labels: np.ndarray
    _names: Names

    def __len__(self) -> int:
        return len(self._names)

    @abc.abstractmethod
    def _sizes_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the size in bytes of the files at these numbers, -1 of one that is gone."""

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of names, labels and sizes; see `ImageSource`."""
        columns = [self.labels[numbers].tolist()]
        columns += [self._sizes_of(numbers).tolist()] if with_sizes else []
        return digest([*(self._names[number] for number in numbers.tolist()), *map(str, columns)])


def hold_out(source: FileSource, fraction: float, seed: int) -> np.ndarray:
    """Return which images belong to the validation split of a data set that has none of its own, [N] bool.

    They are a function of their names and the seed: of each class, `fraction` of its images, rounded, but not all.
    """
    is_val, num_images = np.zeros(len(source), bool), np.bincount(source.labels, minlength=source.num_classes)
    num_val = np.minimum(np.floor(fraction * num_images + 0.5), np.maximum(num_images - 1, 0))
    rank = np.array([_rank(f"{seed}/{source.name_of(number)}") for number in range(len(source))], np.uint64)
    order = np.lexsort((rank, source.labels))
    labels = source.labels[order]
    place_in_class = np.arange(len(source)) - (np.cumsum(num_images) - num_images)[labels]
    is_val[order] = place_in_class < num_val[labels]
    return is_val


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def list_some(names: Iterable[str]) -> str:
    """Return the first names as a text, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def note_ignored(where: object, kinds: Counter[str], first: str) -> tuple[str, ...]:
    """Return the note on files that are not read, () without any. kinds: their number by suffix."""
    if not kinds:
        return ()
    by_number = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    counts = list_some(f"{count:,} {kind or 'without suffix'}" for kind, count in by_number)
    return (f"{where}: {kinds.total():,} files of other kinds are ignored: {counts} (first: {first})",)


def note_figures(where: object, figures: Iterable[str]) -> tuple[str, ...]:
    """Return the note on figures of our commands that are left out, see `find_figures`, () without any."""
    figures = sorted(figures)
    words = "files left out, which show several images or curves"
    return (f"{where}: {len(figures):,} {words}: {list_some(figures)}",) if figures else ()


def note_empty(where: object, source: FileSource) -> tuple[str, ...]:
    """Return the note on classes that have no images, () without any."""
    is_empty = np.bincount(source.labels, minlength=source.num_classes) == 0
    names = [name for name, empty in zip(source.label_names, is_empty.tolist(), strict=True) if empty]
    return (f"{where}: {len(names):,} classes have no images: {list_some(names)}",) if names else ()
