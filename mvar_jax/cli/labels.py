"""Class labels on the command line."""

import re

import numpy as np

from mvar_jax.checkpoints.class_names import ClassNames
from mvar_jax.errors import InputError

MAX_CLASSES = 2**20  # more than any model has


def parse_labels(text: str, names: ClassNames) -> np.ndarray:
    """Return the labels of a list such as "207,golden retriever,0-9" as int32 [N]; a number is never a name.

    Raises InputError for a name that is not one of `names`, a range that decreases, or a number that no model has.
    """
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            labels.append(names.find(part.strip()))
            continue
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            words = f"labels: a range must increase, such as 0-9, got {part.strip()}"
            raise InputError(words, field="labels", given=part, expected="an increasing range")
        if last >= MAX_CLASSES:  # before a range of them fills the memory; the model's own number is checked later
            words = f"labels must be class numbers below {MAX_CLASSES}, got {part.strip()}"
            raise InputError(words, field="labels", given=part, expected=f"below {MAX_CLASSES}")
        labels.extend(range(first, last + 1))
    return np.asarray(labels, np.int32)
