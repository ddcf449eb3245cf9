"""Sets of images to be scored: files, an .npz file or a data source, cut to squares of one size as in training."""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.image_files import ImageFiles
from mvar_jax.data.options import DataOptions
from mvar_jax.data.protocols import ImageSource, Transform
from mvar_jax.data.sources import SPLITS
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.evaluation.reconstruction import load_all, readable
from mvar_jax.evaluation.reference import IMAGES, ImageFile
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.files.paths import as_path

FIELD = "images"
KINDS = ("digits", "folder", "tars", "tfds")
FORMS = (
    "a folder of images or an image file, FILE.npz with arr_0 (uint8 NHWC), folder:SPLIT:PATH, tars:SPLIT:PATH, "
    "tfds:SPLIT:NAME or digits:SPLIT"
)


class ImageSet(abc.ABC):
    """Images by number.

    Attributes:
      about: which images these are and how they are cut, JSON values: two sets that differ have other values.
      notes: what is left out or unusual, a line each.
    """

    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name_of(self, number: int) -> str:
        """Return the name by which a person finds an image."""

    @abc.abstractmethod
    def stream(self, numbers: Sequence[int]) -> Iterator[np.ndarray | str]:
        """Yield the pixels `[Y, X, 3] uint8` of each image, or the reason why it has none. numbers: ascending."""


class SourceImages(ImageSet):
    """The images of a source, decoded by threads."""

    def __init__(self, source: ImageSource, transform: Transform, about: dict[str, Any]):
        self._source, self._transform = source, transform
        self.about = about | {"identity": source.identity(), "transform": transform.describe()}
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self._source)

    def name_of(self, number: int) -> str:
        return readable(self._source.name_of(number))

    def stream(self, numbers: Sequence[int]) -> Iterator[np.ndarray | str]:
        """Yield the pixels of each image, or the reason why it has none; threads load some ahead."""
        return load_all(numbers, lambda number: self._transform(self._source[number]["image"]))


class NpzImages(ImageSet):
    """The images of an .npz file, read in one pass."""

    def __init__(self, images: ImageFile, transform: Transform, about: dict[str, Any]):
        self._images, self._transform = images, transform
        with NpzFile(FIELD, images.path) as file:
            identity = {"shape": list(images.shape), "crc32": file.checksum(IMAGES)}
        self.about = about | {"identity": identity, "transform": transform.describe()}

    def __len__(self) -> int:
        return len(self._images)

    def name_of(self, number: int) -> str:
        return f"image {number}"

    def stream(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the pixels of each image."""
        with self._images.reading() as read:
            for number in numbers:
                yield self._transform(read(range(number, number + 1))[0])


def open_images(text: str, image_size: int, out: Path, upright: bool = True) -> ImageSet:
    """Return the images that a user names.

    Args:
      text: one of FORMS.
      image_size: side to which they are cut.
      out: folder of the results, which are no images of the set.
      upright: obey the camera's orientation tag.

    Raises InputError if there are no such images.
    """
    kind, colon, rest = text.partition(":")
    if kind in KINDS and colon:
        return open_split(*_options_of(text, kind, rest, image_size, upright), text)
    path, transform = as_path(text, FIELD), PhotoTransform(image_size, flip=False, upright=upright)
    about = {"source": text.rstrip("/")}
    if path.suffix == ".npz":
        return NpzImages(ImageFile.open(FIELD, path), transform, about)
    return SourceImages(ImageFiles(path, out), transform, about)


def open_split(data: DataOptions, split: str, text: str) -> ImageSet:
    """Return a split of a data set. text: what the user wrote. Raises InputError if it cannot be opened."""
    if split not in SPLITS:
        raise _refuse(text, f"{text.partition(':')[0]}:SPLIT with SPLIT {' or '.join(SPLITS)}")
    return SourceImages(data.open(split), data.transform(), {"source": text.rstrip("/")})


def _options_of(text: str, kind: str, rest: str, image_size: int, upright: bool) -> tuple[DataOptions, str]:
    """Return the options and the split of KIND:SPLIT[:WHERE]."""
    split, _, where = rest.partition(":")
    if bool(where) == (kind == "digits"):
        raise _refuse(text, FORMS)
    options: dict[str, Any] = {"source": kind, "image_size": image_size}
    if kind != "digits":
        options |= {"name" if kind == "tfds" else "path": where, "upright": upright}
    return DataOptions(**options), split


def _refuse(text: str, expected: str) -> InputError:
    return InputError(f"--images must be {expected}, got {text!r}", field=FIELD, given=text, expected=expected)
