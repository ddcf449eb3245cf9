"""What the pipeline asks of sources and transforms.

There are two kinds of source: images, read one by one and transformed, and token caches, read a batch at a time.
`Source.field` says which one it is.
"""

import abc
import hashlib
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np

_NUM_NAMES = 64  # a name of a TFDS set is a read of the set


def digest(texts: Iterable[str]) -> str:
    """Return a hex digest of a sequence of texts; file names need not be UTF-8."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Source(abc.ABC):
    """One split of a labelled data set. It may be read from several threads at once and sent to other processes.

    Attributes:
      field: what its batches hold: "image" for an `ImageSource`, "ids" for a `TokenSource`.
      label_names: display name of each class, in the order of the labels.
      notes: what is left out or unusual, a line each: to be shown once at the start.
    """

    field: Literal["image", "ids"]
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name_of(self, index: int) -> str:
        """Return the name by which a person finds item `index`."""

    def identity(self) -> dict[str, Any]:
        """Return what tells these data from others wherever they lie, as a JSON object.

        Number of items, classes and the names of some items: reading all items would take too long.
        """
        numbers = sorted({i * len(self) // _NUM_NAMES for i in range(_NUM_NAMES)}) if len(self) else []
        return {
            "holds": self.field,
            "num_items": len(self),
            "classes": digest(self.label_names),
            "names": digest(self.name_of(number) for number in numbers),
        }


class ImageSource(Source):
    """Images by random access."""

    field = "image"

    def identity(self) -> dict[str, Any]:
        """Return what tells these images from others; of files also a digest of all their names."""
        files = self.files_digest(np.arange(len(self)), with_sizes=False)
        return super().identity() | ({"files": files} if files else {})

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of the files of these items without reading them: names, labels and, if asked for, sizes.

        "" if the items are no files, or if this cannot be known without reading them.
        """
        return ""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"image": array or bytes of an image file, "label": int}`. Raises BadImage if it is unreadable."""


class TokenSource(Source):
    """Token pyramids by random access, one or more views of each image."""

    field = "ids"

    @abc.abstractmethod
    def read(self, numbers_B: np.ndarray, seed: int, index_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Read a batch, one view of each record.

        Args:
          numbers_B: [B] integers: which records, from 0 to len - 1.
          seed: of the draw of views.
          index_B: [B] integers: each row's place in the stream of samples; its view is drawn by (seed, index). If
            None, the first view is read.

        Returns:
          (ids [B, L] int32, labels [B] int32).
        """


class Transform(Protocol):
    """From the image of an item to pixels, uint8 [Y, X, 3]. Methods raise BadImage if the image cannot be used."""

    def __call__(self, image: np.ndarray | bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the pixels, augmented if there is an rng."""
        ...

    def view(self, image: np.ndarray | bytes, view: int, rng: np.random.Generator) -> np.ndarray:
        """Return the pixels of view `view` of a token cache."""
        ...

    def check_views(self, num_views: int) -> None:
        """Raise InputError if a token cache of `num_views` views would repeat or lack one."""
        ...

    def describe(self) -> str:
        """Return in words what is done to an image without an rng."""
        ...
