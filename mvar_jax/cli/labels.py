"""Class labels as people write them."""

import re

import numpy as np

from mvar_jax.errors import InputError


def parse_labels(text: str) -> np.ndarray:
    """ "207,360" or "0-9" or both, as int32 [N]. Raises InputError for anything else."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise InputError("labels", text, "numbers with commas between them, as 207,360, or a range, as 0-9")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError("labels", part, "a range that grows, as 0-9")
        labels.extend(range(first, last + 1))
    return np.asarray(labels, np.int32)
