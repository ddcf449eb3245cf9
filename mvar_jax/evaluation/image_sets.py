"""Sets of images to be scored: files, an .npz file or a data source, cut to squares of one size as in training."""

import abc
import contextlib
import dataclasses
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mvar_jax.data.image_files import ImageFiles
from mvar_jax.data.options import DataOptions
from mvar_jax.data.protocols import ImageSource, Transform, digest
from mvar_jax.data.sources import SPLITS
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError, shorten
from mvar_jax.evaluation.reconstruction import load_all, readable
from mvar_jax.evaluation.reference import IMAGES, ImageFile
from mvar_jax.fields import from_dict
from mvar_jax.files.json_files import read_json
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.files.paths import as_path

FIELD = "images"
NUM_CONTENTS = 1000  # images whose bytes tell two sets apart
CONFIG_FILE = "config.json"  # of a training workdir
PLACES = {"folder": "path", "tars": "path", "tfds": "name"}  # data set -> the option that WHERE gives
KINDS = ("digits", *PLACES)
FORMS = (
    "a folder of images or an image file, FILE.npz with arr_0, config:SPLIT for the tokenizer's own data, "
    "folder:SPLIT:PATH, tars:SPLIT:PATH, tfds:SPLIT:NAME or digits:SPLIT"
)


class WorkdirConfig(TypedDict):
    """The part of config.json that is read."""

    data: dict[str, Any]


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
    def stream(self, numbers: Sequence[int]) -> Generator[np.ndarray | str, None, None]:
        """Yield the pixels `[Y, X, 3] uint8` of each image, or the reason why it has none. numbers: ascending."""


class SourceImages(ImageSet):
    """The images of a source, decoded by threads.

    `about` notices other names or sizes of the files, and other contents of NUM_CONTENTS images spread evenly over
    the set: all images would be a second pass over a large one. A change of further images that keeps their sizes in
    bytes is not noticed.
    """

    def __init__(self, source: ImageSource, transform: Transform, about: dict[str, Any]):
        self._source, self._transform = source, transform
        self.about = about | {"identity": _identity_of(source), "transform": transform.describe()}
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self._source)

    def name_of(self, number: int) -> str:
        return readable(self._source.name_of(number))

    def stream(self, numbers: Sequence[int]) -> Generator[np.ndarray | str, None, None]:
        """Yield the pixels of each image, or the reason why it has none; threads load some ahead."""
        yield from load_all(numbers, lambda number: self._transform(self._source[number]["image"]))


def _identity_of(source: ImageSource) -> dict[str, Any]:
    """Return the identity of a source with digests of its files' sizes and of some contents."""
    num = min(NUM_CONTENTS, len(source))
    numbers = [i * len(source) // num for i in range(num)]
    contents = load_all(numbers, lambda number: _checksum(source[number]["image"]))
    files = source.files_digest(np.arange(len(source)), with_sizes=True)
    return source.identity() | {"sizes": files, "contents": digest(map(str, contents))}


def _checksum(image: np.ndarray | bytes) -> int:
    return zlib.crc32(image if isinstance(image, bytes) else np.ascontiguousarray(image))


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

    def stream(self, numbers: Sequence[int]) -> Generator[np.ndarray, None, None]:
        """Yield the pixels of each image."""
        with self._images.reading() as read:
            for number in numbers:
                yield self._transform(read(range(number, number + 1))[0])


def open_images(
    text: str,
    image_size: int,
    out: Path,
    upright: bool = True,
    tokenizer: Path | None = None,
    field: str = FIELD,
    channels: int = 3,
) -> ImageSet:
    """Return the images that a user names.

    Args:
      text: one of FORMS.
      image_size: side to which images are cut.
      out: folder of the results, which are no images of the set.
      upright: obey the camera's orientation tag.
      tokenizer: the workdir whose config config:SPLIT means; None without one.
      field: name of the option, for errors.
      channels: of the images.

    Raises InputError if there are no such images.
    """
    kind, colon, rest = text.partition(":")
    about = {"source": text.rstrip("/")}
    if colon and kind in ("config", *KINDS):
        split, _, where = rest.partition(":")
        if split not in SPLITS or bool(where) != (kind in PLACES):
            forms = f"{kind}:SPLIT{':WHERE' * (kind in PLACES)} with SPLIT {' or '.join(SPLITS)}"
            raise InputError(f"--{field} must be {forms}, got {text!r}", field=field, given=text, expected=forms)
        if kind == "config":
            data = _data_of(text, tokenizer, field)
        else:
            options: dict[str, Any] = {PLACES[kind]: where} if where else {}
            data = DataOptions(source=kind, image_size=image_size, **options)
        data = data if upright else dataclasses.replace(data, upright=False)
        return SourceImages(data.open(split), data.transform(channels), about)
    path, transform = as_path(text, field), PhotoTransform(image_size, flip=False, upright=upright, channels=channels)
    if path.suffix == ".npz":
        return NpzImages(ImageFile.open(field, path, allows_alpha=True), transform, about)
    return SourceImages(ImageFiles(path, out, field), transform, about)


def _data_of(text: str, tokenizer: Path | None, field: str) -> DataOptions:
    """Return the data of a workdir. Raises InputError if the folder is not a workdir."""
    try:
        config = read_json(tokenizer / CONFIG_FILE, WorkdirConfig) if tokenizer else None
    except (OSError, ValueError) as error:
        message = f"--{field}={text} needs the {CONFIG_FILE} of a training workdir as --tokenizer: {shorten(error)}"
        raise InputError(message, field=field, given=text, expected=FORMS) from None
    if config is None:
        raise InputError(f"--{field} must be {FORMS}, got {text!r}", field=field, given=text, expected=FORMS)
    return from_dict(DataOptions, config["data"], "config.data")


def require_usable(images: ImageSet) -> None:
    """Raise InputError if no image of a set can be used; the first that can be ends the look."""
    bad, last = 0, ""
    with contextlib.closing(images.stream(range(len(images)))) as loaded:
        for number, pixels in enumerate(loaded):
            if not isinstance(pixels, str):
                return
            bad, last = bad + 1, f"; the last is {images.name_of(number)}: {pixels}"
    expected, given = "an image that can be used", f"{bad} bad ones"
    message = f"--images must hold {expected}, got {given}{last}"
    raise InputError(message, field=FIELD, given=given, expected=expected)
