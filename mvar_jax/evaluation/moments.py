"""Mean and covariance of features in float64, streamed and merged (Chan, Golub, LeVeque 1983)."""

from typing import NamedTuple

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.values import as_array

CHUNK_ROWS = 4096


def check_features(features_ND, field: str = "features", min_rows: int = 1) -> np.ndarray:
    """Return features as an array `[N, D]` of floats.

    Raises InputError if they are of another form, less than `min_rows` rows, or not finite.
    """
    expected = f"numbers [N, D] with at least {min_rows} {'row' if min_rows == 1 else 'rows'}"
    features_ND = as_array(features_ND, field, expected)
    given = list(features_ND.shape)
    is_right = features_ND.ndim == 2 and len(features_ND) >= min_rows and features_ND.shape[1] > 0
    if not is_right or features_ND.dtype.kind not in "fiubV":  # V: bfloat16
        message = f"{field} must be {expected}, got {features_ND.dtype} {given}"
        raise InputError(message, field=field, given=given, expected=expected)
    if features_ND.dtype.kind != "f":
        features_ND = features_ND.astype(np.float64)
    for begin in range(0, len(features_ND), CHUNK_ROWS):
        is_bad_N = ~np.isfinite(features_ND[begin : begin + CHUNK_ROWS]).all(1)
        if is_bad_N.any():
            row = begin + int(is_bad_N.argmax())
            message = f"{field} must be finite, got NaN or infinity in row {row} of {given[0]}"
            raise InputError(message, field=field, given=row, expected="finite numbers")
    return features_ND


class Moments(NamedTuple):
    """Number, mean and centred squares of rows: enough to merge sets without loss, unlike E[xx] - E[x]E[x].

    Attributes:
      count: rows.
      mean_D: their mean, float64.
      squares_DD: the sum over rows of (x - mean)(x - mean)^T, float64.
    """

    count: int
    mean_D: np.ndarray
    squares_DD: np.ndarray

    @classmethod
    def of(cls, features_ND, field: str = "features") -> "Moments":
        """Return the moments of rows of any float dtype. Raises InputError if they are no features."""
        features_ND = check_features(features_ND, field)
        total = cls._of_chunk(features_ND[:CHUNK_ROWS])
        for begin in range(CHUNK_ROWS, len(features_ND), CHUNK_ROWS):
            total = total.merge(cls._of_chunk(features_ND[begin : begin + CHUNK_ROWS]))
        return total

    @classmethod
    def _of_chunk(cls, rows_nD: np.ndarray) -> "Moments":
        rows_nD = rows_nD.astype(np.float64)
        mean_D = rows_nD.mean(0)
        rows_nD -= mean_D
        return cls(len(rows_nD), mean_D, rows_nD.T @ rows_nD)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both."""
        count = self.count + other.count
        shift_D = other.mean_D - self.mean_D
        squares_DD = np.outer(shift_D, shift_D * (self.count * other.count / count))
        squares_DD += self.squares_DD
        squares_DD += other.squares_DD
        return Moments(count, self.mean_D + shift_D * (other.count / count), squares_DD)

    @property
    def covariance_DD(self) -> np.ndarray:
        """Return the unbiased covariance (ddof 1). Raises InputError if there are less than two rows."""
        if self.count < 2:
            message = f"features must have at least 2 rows for a covariance, got {self.count}"
            raise InputError(message, field="features", given=self.count, expected="at least 2 rows")
        return self.squares_DD / (self.count - 1)


class RunningMoments:
    """Moments of rows that come in small batches; they are collected and added a chunk at a time."""

    def __init__(self):
        self._total: Moments | None = None
        self._rows: list[np.ndarray] = []

    def add(self, features_ND) -> None:
        """Add rows. Raises InputError if they are no features."""
        self._rows.append(check_features(features_ND))
        if sum(map(len, self._rows)) >= CHUNK_ROWS:
            self._flush()

    def moments(self) -> Moments:
        """Return the moments of all rows so far. Raises InputError if there are none."""
        if self._rows:
            self._flush()
        if self._total is None:
            message = "features must have at least 1 row, got none"
            raise InputError(message, field="features", given=0, expected="at least 1 row")
        return self._total

    def _flush(self) -> None:
        new = Moments.of(np.concatenate(self._rows))
        self._total, self._rows = new if self._total is None else self._total.merge(new), []
