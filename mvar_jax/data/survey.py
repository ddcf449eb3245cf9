"""A walk through a whole source before training: bad images, class counts, decoding rate, a contact sheet."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvar_jax.data.decoding import BadImage
from mvar_jax.data.pipeline import load
from mvar_jax.data.protocols import ImageSource, Transform
from mvar_jax.data.skipped import Skipped
from mvar_jax.progress import track


@dataclass
class Survey:
    """What a walk found in one split.

    Attributes:
      counts_C: good images of each class, [C] int64.
      bad: `{"number", "name", "reason"}` of each bad image.
      seconds: duration of the walk.
      pictures_NYX3: pixels of good images spread evenly over the split, [N, Y, X, 3] uint8.
    """

    split: str
    label_names: tuple[str, ...]
    counts_C: np.ndarray
    bad: list[dict[str, Any]]
    seconds: float
    num_threads: int
    pictures_NYX3: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        num_good, counts = int(self.counts_C.sum()), self.counts_C
        order = np.argsort(counts, kind="stable")
        return {
            "num_images": num_good + len(self.bad),
            "num_good": num_good,
            "num_bad": len(self.bad),
            "num_classes": len(self.label_names),
            "num_empty_classes": int((counts == 0).sum()),
            "fewest": {self.label_names[i]: int(counts[i]) for i in order[:3]},
            "most": {self.label_names[i]: int(counts[i]) for i in order[::-1][:3]},
            "median_per_class": float(np.median(counts)),
            "images_per_s": round((num_good + len(self.bad)) / max(self.seconds, 1e-9), 1),
            "num_threads": self.num_threads,
            "bad": self.bad,
            "counts": {name: int(count) for name, count in zip(self.label_names, counts, strict=True)},
        }


def survey(source: ImageSource, transform: Transform, split: str, *, num_pictures: int, num_threads: int) -> Survey:
    """Load and transform every image once, with a progress bar. Any number of bad images is listed, none raises."""
    num_threads = max(1, num_threads)
    wanted = set(np.linspace(0, len(source) - 1, num_pictures).round().astype(int).tolist())

    skipped = Skipped(split, len(source), 1.0)
    counts_C, pictures = np.zeros(source.num_classes, np.int64), []

    def visit(number: int):
        try:
            pixels, label = load(source, transform, number)
        except BadImage as error:
            return str(error)
        return label, pixels if number in wanted else None

    import grain  # slow to import

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=16 * num_threads)
    began = time.monotonic()
    visits = iter(grain.MapDataset.range(len(source)).map(visit).to_iter_dataset(options))
    for number, found in enumerate(track(visits, len(source), split, "image")):
        if isinstance(found, str):
            skipped.add(number, source.name_of(number), found)
            continue
        counts_C[found[0]] += 1
        if found[1] is not None:
            pictures.append(found[1])
    seconds = time.monotonic() - began
    pictures_NYX3 = np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
    return Survey(split, source.label_names, counts_C, skipped.entries(), seconds, num_threads, pictures_NYX3)
