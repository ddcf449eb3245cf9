"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) in tiles on the device.

A set's manifold is the union of balls around its points, each as large as the distance to the point's k-th nearest
neighbour. Precision is the share of samples in the references' manifold, recall the share of references in the
samples'. The whole matrix of distances never exists.
"""

import contextlib
import functools
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.evaluation.moments import check_features
from mvar_jax.files.npz import save_npz
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.files.paths import as_path
from mvar_jax.values import as_integer

TILE_ROWS, TILE_COLUMNS = 2048, 4096
SAVE_EVERY_S = 60.0
ROUNDING = 8.0  # of a squared distance, in units of eps (|u|^2 + |v|^2); of 2048 features 4.0 was measured on a CPU


def precision_recall(reference_ND, sample_ND, k: int = 3, *, progress=None) -> tuple[float, float]:
    """Return (precision, recall) of samples against references, both in [0, 1].

    Distances are float32, or float64 if one of the sets is; a ball's radius is the distance to the k-th nearest other
    point. Recall grows with the number of samples.

    Args:
      reference_ND, sample_ND: features `[N, D]`; the sets may differ in size.
      k: neighbours.
      progress: path of an .npz file to continue from, written every minute. A file of other features or another k is
        replaced.

    Raises:
      InputError: the sets differ in width, have no more than k rows or are not finite, or k is below 1.
    """
    k = as_integer(k, "k", 1)
    reference_ND = check_features(reference_ND, "reference", k + 1)
    sample_ND = check_features(sample_ND, "sample", k + 1)
    if reference_ND.shape[1] != sample_ND.shape[1]:
        expected, given = reference_ND.shape[1], sample_ND.shape[1]
        message = f"features of both sets must have the same width, got {expected} and {given}"
        raise InputError(message, field="sample", given=given, expected=str(expected))
    dtype = np.result_type(reference_ND, sample_ND)
    dtype = np.float64 if dtype == np.float64 else np.float32
    centre_D = _find_centre(reference_ND)
    sets = {"reference": _centred(reference_ND, centre_D, dtype), "sample": _centred(sample_ND, centre_D, dtype)}
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        state = _Progress(sets, k, None if progress is None else as_path(progress, "progress"))
        for name in sets:
            _find_radii(sets[name], k, state, f"{name}_radii")
        _find_inside(sets, state)
    state.save()
    arrays = state.arrays
    return float(arrays["is_precise"].mean()), float(arrays["is_recalled"].mean())


def _find_centre(features_ND: np.ndarray) -> np.ndarray:
    """Return the mean of features, `[D] float64`, rounded to a power of two that is about as large as their spread.

    So the features less this mean are exact, and equal distances stay equal.
    """
    spread_D = np.subtract(features_ND.max(0), features_ND.min(0), dtype=np.float64)
    step_D = np.ldexp(1.0, np.frexp(spread_D)[1] - 1)
    return np.rint(features_ND.mean(0, dtype=np.float64) / step_D) * step_D


def _centred(features_ND: np.ndarray, centre_D: np.ndarray, dtype) -> np.ndarray:
    """Return the features less their centre: in distances, which do not depend on it, a large offset would cancel."""
    found = np.empty(features_ND.shape, dtype)
    for begin in range(0, len(found), TILE_ROWS):
        found[begin : begin + TILE_ROWS] = features_ND[begin : begin + TILE_ROWS] - centre_D
    return found


class _Progress:
    """What is known so far: squared radii, who is inside, and the rows that each of the three walks has done."""

    def __init__(self, sets: dict[str, np.ndarray], k: int, path: Path | None):
        self._path, self._saved_s = path, time.monotonic()
        n, m = len(sets["reference"]), len(sets["sample"])
        dtype = sets["sample"].dtype
        self.arrays = {
            "reference_radii": np.zeros(n, dtype),
            "sample_radii": np.zeros(m, dtype),
            "is_precise": np.zeros(m, bool),
            "is_recalled": np.zeros(n, bool),
            "done": np.zeros(3, np.int64),  # rows of the references' radii, of the samples', of the comparison
        }
        if path is not None:
            self.arrays["identity"] = np.array([k, *(zlib.crc32(np.ascontiguousarray(x)) for x in sets.values())])
            self._load(path)

    def begin(self, walk: int) -> int:
        """Return the first row that a walk has not done."""
        return int(self.arrays["done"][walk])

    def finish(self, walk: int, row: int) -> None:
        """Note that a walk has done all rows before `row`, and save from time to time."""
        self.arrays["done"][walk] = row
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        if self._path is not None:
            save_npz(self._path, **self.arrays)
            self._saved_s = time.monotonic()

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            with NpzFile("progress", path) as file:
                found = {name: file.read(name, x.shape, x.dtype.kind) for name, x in self.arrays.items()}
        except InputError:
            return  # of other sets, or cut by a kill of the machine
        fits = all(x.dtype == self.arrays[name].dtype for name, x in found.items())
        if fits and np.array_equal(found["identity"], self.arrays["identity"]):
            self.arrays = {name: x.copy() for name, x in found.items()}


def _find_radii(features_ND: np.ndarray, k: int, state: _Progress, name: str) -> None:
    """Fill in the squared distance of each row to its k-th nearest other row."""
    walk = 0 if name == "reference_radii" else 1
    num_rows = min(TILE_ROWS, len(features_ND))
    tiles = _tiles(features_ND, max(min(TILE_COLUMNS, len(features_ND)), k + 1))
    for begin in range(state.begin(walk), len(features_ND), num_rows):
        rows_nD = _padded(features_ND[begin : begin + num_rows], num_rows)
        nearest_nk = jnp.full((num_rows, k + 1), jnp.inf, features_ND.dtype)  # a row is its own nearest
        for tile_mD, num_real in tiles:
            nearest_nk = _update_nearest(nearest_nk, rows_nD, tile_mD, num_real)
        end = min(begin + num_rows, len(features_ND))
        state.arrays[name][begin:end] = np.asarray(nearest_nk)[: end - begin, -1]
        state.finish(walk, end)


def _find_inside(sets: dict[str, np.ndarray], state: _Progress) -> None:
    """Fill in which samples are in a reference's ball, and which references in a sample's."""
    samples_ND, num_references = sets["sample"], len(sets["reference"])
    num_rows, num_columns = min(TILE_ROWS, len(samples_ND)), min(TILE_COLUMNS, num_references)
    tiles, arrays = _tiles(sets["reference"], num_columns), state.arrays
    radii_of_tiles = [
        _padded(arrays["reference_radii"][i : i + num_columns], num_columns, -1)
        for i in range(0, num_references, num_columns)
    ]
    for begin in range(state.begin(2), len(samples_ND), num_rows):
        end = min(begin + num_rows, len(samples_ND))
        rows_nD = _padded(samples_ND[begin:end], num_rows)
        row_radii_n = _padded(arrays["sample_radii"][begin:end], num_rows, -1)  # no distance is below -1
        for i, ((tile_mD, num_real), radii_m) in enumerate(zip(tiles, radii_of_tiles, strict=True)):
            is_precise, is_recalled = _compare(rows_nD, tile_mD, row_radii_n, radii_m)
            arrays["is_precise"][begin:end] |= np.asarray(is_precise)[: end - begin]
            first = i * num_columns
            arrays["is_recalled"][first : first + num_real] |= np.asarray(is_recalled)[:num_real]
        state.finish(2, end)


def _tiles(features_ND: np.ndarray, num_rows: int) -> list[tuple[jax.Array, int]]:
    """Return the rows in tiles of one shape on the device, each with its number of real rows."""
    parts = [features_ND[i : i + num_rows] for i in range(0, len(features_ND), num_rows)]
    return [(jnp.asarray(_padded(part, num_rows)), len(part)) for part in parts]


def _padded(rows: np.ndarray, num_rows: int, value: float = 0) -> np.ndarray:
    if len(rows) == num_rows:
        return rows
    padding = np.full((num_rows - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, padding])


def _squared_distances(rows_nD: jax.Array, columns_mD: jax.Array) -> jax.Array:
    """Return `[n, m]` from a product in full precision on every device; 0 if it is no larger than its rounding.

    Without this a copy lies outside a ball of radius 0, and repeated images would lower precision and recall.
    """
    product_nm = jnp.matmul(rows_nD, columns_mD.T, precision=jax.lax.Precision.HIGHEST)
    squares = lambda x: jnp.square(x).sum(1)
    sums_nm = squares(rows_nD)[:, None] + squares(columns_mD)
    distances_nm = sums_nm - 2 * product_nm
    return jnp.where(distances_nm > ROUNDING * jnp.finfo(sums_nm.dtype).eps * sums_nm, distances_nm, 0)


@functools.partial(jax.jit, donate_argnums=0)
def _update_nearest(nearest_nk: jax.Array, rows_nD, columns_mD, num_real) -> jax.Array:
    """Return the smallest distances so far and to the first `num_real` columns, in order."""
    distances_nm = _squared_distances(rows_nD, columns_mD)
    distances_nm = jnp.where(jnp.arange(len(columns_mD)) < num_real, distances_nm, jnp.inf)
    k = nearest_nk.shape[1]
    found_nk = -jax.lax.top_k(-distances_nm, k)[0]
    return -jax.lax.top_k(-jnp.concatenate([nearest_nk, found_nk], 1), k)[0]


@jax.jit
def _compare(rows_nD, columns_mD, row_radii_n, column_radii_m) -> tuple[jax.Array, jax.Array]:
    """Return which rows are in the ball of any column, and which columns in the ball of any row."""
    distances_nm = _squared_distances(rows_nD, columns_mD)
    return (distances_nm <= column_radii_m).any(1), (distances_nm <= row_radii_n[:, None]).any(0)
