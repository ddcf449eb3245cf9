"""Class labels as people write them."""

import re

import numpy as np

from mvar_jax.checkpoints.class_names import ClassNames
from mvar_jax.errors import InputError


def parse_labels(text: str, names: ClassNames) -> np.ndarray:
    """ "207,360", "0-9", "golden retriever" or a list of them, as int32 [N]. A number is never a name.

    Raises InputError for a name that is not one of `names`, or a range that shrinks.
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
            raise InputError("labels", part, "a range that grows, as 0-9")
        labels.extend(range(first, last + 1))
    return np.asarray(labels, np.int32)
