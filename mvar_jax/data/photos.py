"""Photographs that installed packages bring, cut into crops: scikit-learn's, and scikit-image's if it is there."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.data.decoding import read_image
from mvar_jax.data.protocols import ImageSource, digest
from mvar_jax.errors import InputError

# package -> folder inside it and files; both packages' other images are drawings, grey or second views
FILES = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
}


def find_photos() -> dict[str, Path]:
    """Return the files by name. Neither package is imported, and nothing is downloaded."""
    found = {}
    for package, (folder, names) in FILES.items():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            found |= {name: path for name in names if (path := Path(place, folder, name)).is_file()}
    return found


class CropSource(ImageSource):
    """Square crops of photographs, not resized; a crop's label is the number of its photograph.

    The right `val_fraction` of each photograph is held out, tile beside tile. The training items are the crops at
    every position left of it, so no pixel is in both splits.

    Args:
      photos: pixels by name, each `[Y, X, 3] uint8`.
      split: "train" or "val".
      side: of the crops, in pixels.
      val_fraction: share of a photograph's width that is held out.

    Raises:
      InputError: there is no photograph, or a crop exceeds a photograph's part.
    """

    def __init__(self, photos: dict[str, np.ndarray], split: str, side: int, val_fraction: float):
        if not photos:
            words = "data.source=photos finds no photograph in the installed packages; "
            words += "bring some with: pip install scikit-learn scikit-image"
            raise InputError(words, field="data.source", given="photos", expected="an installed package with some")
        self._side, self._stride = side, 1 if split == "train" else side
        self._names, self._parts, shapes = tuple(photos), [], []
        for name, photo_YX3 in photos.items():
            height, width = photo_YX3.shape[:2]
            first_held_out = width - round(val_fraction * width)
            parts = (photo_YX3[:, :first_held_out], photo_YX3[:, first_held_out:])
            largest = min(height, *(part.shape[1] for part in parts))
            if side > largest:
                expected = f"at most {largest}, which fits both parts of {name} ({width} x {height} pixels, "
                expected += f"data.val_fraction={val_fraction} of the width held out)"
                words = f"data.image_size must be {expected}, got {side}"
                raise InputError(words, field="data.image_size", given=side, expected=expected)
            part_YX3 = parts[split == "val"]
            self._parts.append(part_YX3)
            shapes.append([(length - side) // self._stride + 1 for length in part_YX3.shape[:2]])
        self._columns = [columns for _, columns in shapes]
        self._begins = np.cumsum([0, *(rows * columns for rows, columns in shapes)])
        self.label_names = tuple(Path(name).stem for name in photos)
        if split == "train":
            self.notes = (f"crops of {len(photos)} photographs: {', '.join(photos)}",)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def _find(self, index: int) -> tuple[int, int, int]:
        """Return (photograph, top, left) of a crop."""
        index = range(len(self))[index]  # negative and out-of-range indices as in a sequence
        photo = int(np.searchsorted(self._begins, index, side="right")) - 1
        row, column = divmod(index - int(self._begins[photo]), self._columns[photo])
        return photo, row * self._stride, column * self._stride

    def name_of(self, index: int) -> str:
        """Return the photograph's file name and the crop's place in its part."""
        photo, top, left = self._find(index)
        return f"{self._names[photo]} at {top}, {left}"

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of the names of all photographs and, if asked for, of their parts' shapes."""
        sizes = [f"{part.shape}" for part in self._parts] if with_sizes else []
        return digest([*self._names, *sizes])

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, top, left = self._find(index)
        return {"image": self._parts[photo][top : top + self._side, left : left + self._side], "label": photo}


def open_photos(split: str, side: int, val_fraction: float) -> CropSource:
    """Return one split of the crops of all photographs that are found. Raises InputError as `CropSource`."""
    photos = {name: read_image(path) for name, path in find_photos().items()}
    return CropSource(photos, split, side, val_fraction)
