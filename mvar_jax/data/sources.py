"""Data sets in memory and the registry: `open_source` is the one place that knows the data sets by name."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mvar_jax.data.protocols import ImageSource
from mvar_jax.errors import InputError

SOURCE_NAMES = ("digits", "photos", "synthetic", "folder", "tfds", "tars")
SPLITS = ("train", "val")
_MADE = ("digits", "photos", "synthetic")  # sets whose validation split is made, never absent


class ArraySource(ImageSource):
    """Images [N, ...] and integer labels [N] that are already in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, label_names: tuple[str, ...]):
        assert len(images) == len(labels)
        self._images, self._labels, self.label_names = images, labels, label_names

    def __len__(self) -> int:
        return len(self._labels)

    def name_of(self, index: int) -> str:
        """Return the item's number."""
        return f"image {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}


class SyntheticSource(ImageSource):
    """Striped uint8 images [64, 64, 3], generated on access, with `label = index % 10`.

    Direction and colour depend on the class, phase and noise on the image. The splits hold different images.
    """

    _SIDE = 64
    _NUM_CLASSES = 10

    def __init__(self, split: str, *, seed: int, size: int):
        self._stream = 2 * seed + SPLITS.index(split)
        self._size = size
        self.label_names = tuple(f"stripes_{label}" for label in range(self._NUM_CLASSES))

    def __len__(self) -> int:
        return self._size

    def name_of(self, index: int) -> str:
        """Return the item's number."""
        return f"image {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self._size)[index]  # negative and out-of-range indices as in a sequence
        label = index % self._NUM_CLASSES
        rng = np.random.Generator(np.random.Philox(key=[self._stream, index]))
        turn = label / self._NUM_CLASSES
        y, x = np.meshgrid(np.arange(self._SIDE), np.arange(self._SIDE), indexing="ij", sparse=True)
        along = y * np.sin(np.pi * turn) + x * np.cos(np.pi * turn)
        stripes_YX = 0.5 + 0.5 * np.sin(2 * np.pi * (along / 12.0 + rng.uniform()))
        colour = 0.5 + 0.5 * np.cos(2 * np.pi * (turn + np.arange(3) / 3))
        image_YX3 = stripes_YX[..., None] * colour + rng.normal(0, 0.05, (self._SIDE, self._SIDE, 3))
        return {"image": (255 * np.clip(image_YX3, 0, 1)).round().astype(np.uint8), "label": label}


class SubsetSource(ImageSource):
    """Items of another source, by their numbers there."""

    def __init__(self, source: ImageSource, numbers: np.ndarray):
        self._source, self._numbers, self.label_names = source, numbers, source.label_names
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self._numbers)

    def name_of(self, index: int) -> str:
        """Return the name that the other source gives the item."""
        return self._source.name_of(int(self._numbers[index]))

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of the files; see `ImageSource`."""
        return self._source.files_digest(self._numbers[numbers], with_sizes=with_sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._numbers[index])]


def _check_size(size: int, num_images: int, split: str) -> None:
    if size > num_images:
        raise InputError(
            f"data.size must be at most {num_images}, the number of {split} images, got {size}",
            field="size",
            given=size,
            expected=f"at most {num_images}",
        )


def _keep(source: ImageSource, size: int, split: str) -> ImageSource:
    """Return `size` items spread evenly over the source, so that one sorted by class keeps its classes; 0 for all."""
    _check_size(size, len(source), split)
    return SubsetSource(source, np.arange(size) * len(source) // size) if size else source


def _open_digits(split: str, split_seed: int, val_fraction: float, size: int) -> ArraySource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    num_all, num_classes = len(data.target), 10
    num_val = math.ceil(val_fraction * num_all)
    if not num_classes <= num_val <= num_all - num_classes:
        expected = f"such that each split of the {num_all} digits has {num_classes} or more"
        words = f"data.val_fraction must be {expected}, got {val_fraction}"
        raise InputError(words, field="data.val_fraction", given=val_fraction, expected=expected)
    parts = train_test_split(
        np.arange(len(data.target)), test_size=val_fraction, random_state=split_seed, stratify=data.target
    )
    chosen = np.sort(parts[SPLITS.index(split)])
    _check_size(size, len(chosen), split)
    chosen = chosen[: size or None]
    images_NYX = (data.images[chosen] / 16).astype(np.float32)
    return ArraySource(images_NYX, data.target[chosen], tuple(str(digit) for digit in range(10)))


def _open_tfds(name: str, path: str, split: str, split_seed: int, val_fraction: float) -> ImageSource:
    """Return the set's own validation or test split as "val", or part of its train split if it has neither."""
    from mvar_jax.data.tfds_source import TfdsSource, val_split

    known = val_split(name, path)
    if split == "val" and known is not None:
        return TfdsSource(name, path, known)
    source = TfdsSource(name, path, "train")
    if known is not None or val_fraction == 0:
        return source
    order = np.random.default_rng(split_seed).permutation(len(source))
    num_val = max(1, round(val_fraction * len(source)))
    return SubsetSource(source, np.sort(order[:num_val] if split == "val" else order[num_val:]))


def _open_files(
    name: str, path: str, split: str, split_seed: int, val_fraction: float, of_folder: dict[str, Any]
) -> ImageSource:
    """Return a split of a folder or of tars, or part of the training images if there is no validation split.

    of_folder: arguments of `FolderSource` alone.
    """
    from mvar_jax.data.file_source import hold_out
    from mvar_jax.data.folder import FolderSource
    from mvar_jax.data.tars import TarSource

    open_one = partial(FolderSource, path, **of_folder) if name == "folder" else partial(TarSource, path)
    if _has_val(name, path, ""):
        return open_one(split)
    if val_labels := of_folder["val_labels"]:
        words = f"data.val_labels={val_labels} needs the folder {path}/val, which does not exist"
        raise InputError(words, field="data.val_labels", given=val_labels, expected="a folder val")
    source = open_one("train")
    if val_fraction == 0:
        return source
    is_val = hold_out(source, val_fraction, split_seed)
    if not is_val.any():
        words = f"data.val_fraction={val_fraction} must hold out at least one of the {len(source)} images of {path}, "
        words += "which has no validation split; raise it, or set it to 0 to train without evaluation"
        raise InputError(words, field="data.val_fraction", given=val_fraction, expected="at least one image")
    part = SubsetSource(source, np.flatnonzero(is_val if split == "val" else ~is_val))
    if split == "val":
        part.notes = ()
    else:
        words = f"{is_val.sum():,} of {len(source):,} images are held out (data.val_fraction={val_fraction})"
        part.notes += (f"{path} has no validation split: {words}",)
    return part


def _has_val(name: str, path: str, tfds_name: str) -> bool:
    """Return whether a data set in files or of TFDS has a validation split of its own."""
    from mvar_jax.data.folder import has_val_folder
    from mvar_jax.data.tars import has_val_tars
    from mvar_jax.data.tfds_source import val_split

    if name == "tfds":
        return val_split(tfds_name, path) is not None
    return has_val_folder(path) if name == "folder" else has_val_tars(path)


def open_source(
    name: str,
    split: str,
    *,
    path: str = "",
    tfds_name: str = "",
    split_seed: int = 0,
    val_fraction: float = 0.2,
    size: int = 0,
    class_order: Sequence[str] = (),
    val_labels: str = "",
    image_size: int = 64,
) -> ImageSource:
    """Open one split of a data set.

    `digits`: the 1,797 images bundled with scikit-learn, float32 [8, 8] in [0, 1]; `val_fraction` of them is
    held out, stratified, by `split_seed`.
    `photos`: crops of photographs that installed packages bring; see data/photos.py.
    `synthetic`: generated uint8 images [64, 64, 3] of 10 classes; each split has `size` of its own, by
    `split_seed`, so `val_fraction` does not apply.
    `folder`, `tars`: files below `path`; see data/folder.py and data/tars.py. Without a validation split
    `val_fraction` of each class is held out, by the names of the files and `split_seed`.
    `tfds`: the set `tfds_name` of TensorFlow Datasets, prepared in `path` ("": TFDS's default); `val_fraction` of
    its train split is held out by `split_seed` if it has no validation and no test split.

    Args:
      split: "train" or "val"; the latter needs to be one of `splits_of`.
      size: number of images of the split to keep; 0 keeps all (`synthetic` has no "all").
      class_order: names of the classes in the order of their labels (`folder`); empty sorts them.
      val_labels: file of the labels of a flat validation folder (`folder`).
      image_size: side of the crops (`photos`).

    Raises:
      InputError: a name or split is unknown, a number is out of range, or the data set is missing.
    """
    _check(name, split, path, split_seed, val_fraction, size)
    if name == "digits":
        return _open_digits(split, split_seed, val_fraction, size)
    if name == "photos":
        from mvar_jax.data.photos import open_photos

        return _keep(open_photos(split, image_size, val_fraction), size, split)
    if name == "synthetic":
        return SyntheticSource(split, seed=split_seed, size=size)
    if split == "val" and not (val_fraction or _has_val(name, path, tfds_name)):
        words = "data.val_fraction must be above 0, got 0: the data set has no validation split"
        raise InputError(words, field="data.val_fraction", given=0, expected="above 0")
    if name == "tfds":
        return _keep(_open_tfds(tfds_name, path, split, split_seed, val_fraction), size, split)
    of_folder = {"class_order": class_order, "val_labels": val_labels}
    return _keep(_open_files(name, path, split, split_seed, val_fraction, of_folder), size, split)


def splits_of(name: str, *, path: str = "", tfds_name: str = "", val_fraction: float = 0.2) -> tuple[str, ...]:
    """Return the splits of a data set: without "val" if it has none of its own and `val_fraction` is 0.

    Raises:
      InputError: the name is unknown, or the data set is missing.
    """
    _check(name, "train", path, 0, val_fraction, 1)
    has_val = val_fraction > 0 or name in _MADE or _has_val(name, path, tfds_name)
    return SPLITS if has_val else SPLITS[:1]


def _check(name: str, split: str, path: str, split_seed: int, val_fraction: float, size: int) -> None:
    smallest = 1 if name == "synthetic" else 0
    is_fraction = 0 < val_fraction < 1 or (val_fraction == 0 and name not in _MADE)
    checks = (
        (name in SOURCE_NAMES, "source", name, f"one of {', '.join(SOURCE_NAMES)}"),
        (split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}"),
        (0 <= split_seed < 2**32, "split_seed", split_seed, "from 0 to 2**32 - 1"),
        (is_fraction, "val_fraction", val_fraction, f"{'above 0' if name in _MADE else '0 or more'} and below 1"),
        (size >= smallest, "size", size, f"{smallest} or more for source={name}"),
    )
    for is_right, field, given, allowed in checks:
        if not is_right:
            key = field if field == "split" else f"data.{field}"
            raise InputError(f"{key} must be {allowed}, got {given!r}", field=field, given=given, expected=allowed)
    if name in ("folder", "tars") and not path:
        raise InputError(
            f"data.path is empty; set it to the folder of the images with --config.data.path=DIR (source={name})",
            field="data.path",
            given=path,
            expected="the folder of the images",
        )
