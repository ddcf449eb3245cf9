"""The newest metrics of every scale, for tasks whose steps train a part of the scales each."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

PER_SCALE = "per_scale"  # their key in the meta data of a checkpoint


class NewestPerScale:
    """The vectors `[S]` of metrics, each scale's value from the newest good step that trained it.

    The steps between two lines of the log train scales that the step of the line does not. Vectors stay on the device
    until `fetch`.

    Args:
      found: what `to_json` returned when the checkpoint was written that the run resumes from.
    """

    def __init__(self, found: dict[str, list[float | None]] | None = None):
        as_vector = lambda values: np.array([math.nan if x is None else x for x in values], np.float32)
        self._start = {name: as_vector(values) for name, values in (found or {}).items()}
        # by the scales that were trained, oldest first
        self._newest: dict[tuple[int, ...], dict[str, Any]] = {}

    def note(self, scales: Sequence[int], metrics: dict[str, Any]) -> None:
        """Keep the vectors of a good step that trained these scales."""
        key = tuple(scales)
        self._newest.pop(key, None)
        self._newest[key] = {name: value for name, value in metrics.items() if np.ndim(value)}

    def fetch(self) -> dict[str, np.ndarray]:
        """Return the vectors on the host, with NaN for scales that no step has trained yet."""
        merged = {name: values.copy() for name, values in self._start.items()}
        for scales, vectors in jax.device_get(list(self._newest.items())):
            for name, values in vectors.items():
                into = merged.setdefault(name, np.full_like(values, math.nan))
                into[list(scales)] = values[list(scales)]
        return merged

    def to_json(self) -> dict[str, list[float | None]]:
        """Return the vectors for the meta data of a checkpoint; those of a resumed run are bit-equal."""
        as_list = lambda values: [float(x) if math.isfinite(x) else None for x in values]
        return {name: as_list(values) for name, values in self.fetch().items()}
