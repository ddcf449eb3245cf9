"""The digits as a run trains on them, without augmentation."""

import numpy as np

from mvar_jax.data.sources import open_source
from mvar_jax.data.transforms import DigitTransform


def load_splits(
    image_size: int, split_seed: int, val_fraction: float, channels: int = 3
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images `[N, Y, X, channels] uint8` and labels `[N]` of "train" and "val"."""
    transform, splits = DigitTransform(image_size, channels=channels), {}
    for split in ("train", "val"):
        source = open_source("digits", split, split_seed=split_seed, val_fraction=val_fraction)
        items = [source[i] for i in range(len(source))]
        images = np.stack([transform(item["image"]) for item in items])
        splits[split] = images, np.asarray([item["label"] for item in items])
    return splits
