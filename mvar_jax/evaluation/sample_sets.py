"""Samples to score: of an .npz file in the published form, of a folder of image files, or of `mvar sample`."""

import contextlib
import io
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mvar_jax.data.decoding import FORMATS, BadImage, has_visible_alpha, open_rgb
from mvar_jax.data.folder import find_images
from mvar_jax.data.protocols import digest
from mvar_jax.errors import InputError, shorten
from mvar_jax.evaluation.image_sets import ImageSet
from mvar_jax.evaluation.reference import IMAGES, ImageFile
from mvar_jax.files.json_files import read_json
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.ops.pixels import repeat_grey
from mvar_jax.progress import track

LABELS = "arr_1"
OPTIONS_FILE, ARRAYS_FILE = "samples.json", "samples.npz"  # of `mvar sample`
NUM_THREADS = 8
SILENT_S = 10.0


@dataclass(frozen=True)
class SampleSet:
    """Images of one size.

    Attributes:
      name: what a user calls the set.
      num_images: images of the set.
      size: their rows and columns.
      read: numbers -> pixels `[n, Y, X, 3] uint8`; ascending numbers are read in one pass.
      about: JSON values that tell these images from others, by the options that named them.
      labels_N: their classes; None if they are not known.
      num_jpeg: images stored as JPEG, which changes their scores.
      sampling: options that drew them; None if they are not known.
      notes: what is left out, a line each.
      num_model_classes: classes of the model that draws them; None if it is not known.
    """

    name: str
    num_images: int
    size: tuple[int, int]
    read: Callable[[range], np.ndarray]
    about: Mapping[str, Any]
    labels_N: np.ndarray | None = None
    num_jpeg: int = 0
    sampling: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    num_model_classes: int | None = None

    def class_balance(self) -> dict[str, int] | None:
        """Return the number of classes, and the least and most images of a class; None if they are not known."""
        if self.labels_N is None:
            return None
        counts = np.unique(self.labels_N, return_counts=True)[1]
        return {"num_classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def open_samples(field: str, path: Path, stack: contextlib.ExitStack) -> SampleSet:
    """Open samples, and close them with the stack.

    path: an .npz file, a folder of `mvar sample`, or any other folder of image files of one size. Raises InputError
    if there are none, a file is damaged, or their sizes differ.
    """
    if not path.exists():
        raise InputError(
            f"{field}={path} is missing", field=field, given=str(path), expected="an .npz file or folder"
        )
    if not path.is_dir():
        return of_npz(field, path, stack)
    if (path / OPTIONS_FILE).exists():
        if not (path / ARRAYS_FILE).exists():
            message = f"{field}={path} holds samples that are not complete; run the same `mvar sample` again"
            raise InputError(message, field=field, given=str(path), expected="complete samples")
        return of_npz(field, path / ARRAYS_FILE, stack)
    return of_folder(field, path)


def of_npz(field: str, path: Path, stack: contextlib.ExitStack) -> SampleSet:
    """Return the images of an .npz file, grey ones three times; `arr_1` with an integer for each holds the labels."""
    images = ImageFile.open(field, path)
    with NpzFile(field, path) as file:
        header, labels_N = file.headers.get(LABELS), None
        if header is not None and header.shape == (len(images),) and header.dtype.kind in "iu":
            labels_N = file.read(LABELS, header.shape, "iu")
        checksum = file.checksum(IMAGES)
    about = {field: {"num_images": len(images), "checksum": checksum}}
    options, sampling = path.with_name(OPTIONS_FILE), None
    if path.name == ARRAYS_FILE and options.exists():
        with contextlib.suppress(OSError, ValueError):  # it is somebody else's
            sampling = read_json(options, dict[str, Any])
    read_stored = stack.enter_context(images.reading())
    read = lambda rows: repeat_grey(read_stored(rows))
    return SampleSet(str(path), len(images), images.shape[1:3], read, about, labels_N, sampling=sampling)


class _Header(NamedTuple):
    """What is known of an image file without its pixels."""

    size: tuple[int, int]
    format: str | None
    num_bytes: int
    crc32: int


def of_folder(field: str, folder: Path) -> SampleSet:
    """Return the images of a folder and its sub-folders by name; sub-folders are classes if no image is outside.

    Every file is read once to be checked; `about` holds a digest of all names, sizes and CRC-32.
    """
    names, notes = find_images(folder)
    if not names:
        message = f"{field}={folder} holds no image files; expected an .npz file or a folder of PNGs"
        raise InputError(message, field=field, given=str(folder), expected="a folder of images")

    def refuse(name: str, reason: str) -> InputError:
        return InputError(f"{field}={folder} holds {name}, which {reason}", field=field, given=str(folder))

    def look(name: str) -> _Header:
        try:
            data = (folder / name).read_bytes()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                header = _Header((image.height, image.width), image.format, len(data), zlib.crc32(data))
                is_opaque = not has_visible_alpha(image)
        except Exception as error:  # Pillow's readers raise anything at all on damaged bytes
            raise refuse(name, f"cannot be read as an image: {shorten(error)}") from None
        if not is_opaque:
            raise refuse(name, "has transparent pixels, and Inception does not know alpha: put it on a background")
        return header

    def load(name: str) -> np.ndarray:
        try:
            return np.asarray(open_rgb((folder / name).read_bytes(), upright=False))
        except (OSError, BadImage) as error:
            raise refuse(name, f"cannot be read: {shorten(error)}") from None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = list(track(pool.map(look, names), len(names), "check", "image", delay_s=SILENT_S))
    size = headers[0].size
    for name, header in zip(names, headers, strict=True):
        if header.size != size:
            shown = "{} x {}".format
            raise refuse(name, f"has {shown(*header.size)} pixels, unlike {names[0]} with {shown(*size)}")

    def read(rows: range) -> np.ndarray:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return np.stack(list(pool.map(load, names[rows.start : rows.stop])))

    classes, labels_N = [name.rpartition("/")[0] for name in names], None
    if all(classes):
        labels_N = np.unique(classes, return_inverse=True)[1]
    files = digest(f"{name} {x.num_bytes} {x.crc32:08x}" for name, x in zip(names, headers, strict=True))
    about = {field: {"num_images": len(names), "files": files}}
    num_jpeg = sum(header.format == "JPEG" for header in headers)
    return SampleSet(str(folder), len(names), size, read, about, labels_N, num_jpeg, notes=notes)


def of_image_set(field: str, name: str, images: ImageSet, size: tuple[int, int]) -> SampleSet:
    """Return images that are cut to one size as they are read."""

    def read(rows: range) -> np.ndarray:
        found = list(images.stream(rows))
        for number, pixels in zip(rows, found, strict=True):
            if isinstance(pixels, str):
                message = f"{field}={name} holds {images.name_of(number)}, which cannot be used: {pixels}"
                raise InputError(message, field=field, given=images.name_of(number), expected="readable images")
        return np.stack(found)

    return SampleSet(name, len(images), size, read, {field: dict(images.about)})
