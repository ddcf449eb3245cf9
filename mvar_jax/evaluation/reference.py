"""Reference sets and samples as .npz files in the published form, and the statistics of a reference.

`arr_0` holds images `[N, Y, X, 3] uint8`, or grey ones `[N, Y, X, 1]`. A reference may also hold `mu`, `sigma` (mean
and covariance of the pool features of the whole training set) and `mu_s`, `sigma_s` (those of the spatial features).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvar_jax.evaluation.inception import POOL_WIDTH, SPATIAL_WIDTH
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.network_files import read_json_array
from mvar_jax.files.npz import Pieces, save_npz
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.files.paths import as_path
from mvar_jax.ops.pixels import MODES

IMAGES = "arr_0"
NETWORK = "network"  # ours: the fingerprint of the network that the statistics come from, as JSON
SYMMETRY_TOLERANCE = 1e-6


class Gaussian(NamedTuple):
    """The mean `[D]` and covariance `[D, D]` of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        return cls(moments.mean_D, moments.covariance_DD)


@dataclass(frozen=True)
class ImageFile:
    """The images of an .npz file, which are read few at a time because 50,000 of 256 x 256 pixels take 9.8 GB.

    Raises InputError if the file is damaged or holds no uint8 images as `arr_0`.
    """

    field: str
    path: Path
    shape: tuple[int, int, int, int]

    @classmethod
    def open(cls, field: str, path: str | os.PathLike, allows_alpha: bool = False) -> "ImageFile":
        """Open grey or RGB images, or RGBA ones too."""
        with NpzFile(field, path) as file:
            return cls(field, file.path, _image_shape(file, allows_alpha))

    def __len__(self) -> int:
        return self.shape[0]

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[range], np.ndarray]]:
        """Yield a function from numbers to images; ascending numbers are read in one pass of the file."""
        with NpzFile(self.field, self.path) as file:
            yield file.row_reader(IMAGES)

    def pieces(self, num_images: int) -> Iterator[np.ndarray]:
        """Yield all images in order, `num_images` at a time and at last fewer."""
        with self.reading() as read:
            for first in range(0, len(self), num_images):
                yield read(range(first, min(first + num_images, len(self))))


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
      pool, spatial: statistics for FID and sFID; None if the file does not hold them.
      images: for precision and recall, and for the statistics that are None; None if the file has no images.
      network: name -> SHA-256 of the files of the network that the statistics come from; {} if the file does not say.
      checksums: of each array by name.
    """

    pool: Gaussian | None
    spatial: Gaussian | None
    images: ImageFile | None
    network: Mapping[str, str]
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_reference(path: str | os.PathLike, field: str = "reference") -> Reference:
    """Read a reference. Raises InputError if it is damaged, or has statistics of another network's features."""
    with NpzFile(field, path) as file:
        pool = _read_gaussian(file, "mu", "sigma", POOL_WIDTH)
        spatial = _read_gaussian(file, "mu_s", "sigma_s", SPATIAL_WIDTH)
        images = ImageFile(field, file.path, _image_shape(file)) if IMAGES in file.headers else None
        if pool is None and images is None:
            raise file.refuse("it has neither statistics (mu, sigma) nor images (arr_0)")
        network = read_json_array(file, NETWORK, dict[str, str]) if NETWORK in file.headers else {}
        checksums = {name: file.checksum(name) for name in file.headers}
        return Reference(pool, spatial, images, network, checksums)


def save_reference(
    path: str | os.PathLike,
    pool: Gaussian,
    spatial: Gaussian,
    images: Pieces | None = None,
    network: Mapping[str, str] | None = None,
) -> None:
    """Write a reference in the published form, which the published evaluator reads too.

    Args:
      pool, spatial: statistics of the whole set.
      images: 10,000 images or so for precision and recall, see `mvar_jax.files.npz`.
      network: `NetworkWeights.sources` of the network that the statistics come from.
    """
    arrays: dict[str, np.ndarray | Pieces] = {"mu": pool.mean_D, "sigma": pool.covariance_DD}
    arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    if images is not None:
        arrays[IMAGES] = images
    if network is not None:
        arrays[NETWORK] = np.array([json.dumps(dict(network))])
    save_npz(as_path(path, "reference"), **arrays)


def _image_shape(file: NpzFile, allows_alpha: bool = False) -> tuple[int, int, int, int]:
    header = file.header(IMAGES, (None,) * 4, "fiub")
    given = f"{header.dtype} {list(header.shape)}"
    if header.dtype != np.uint8:
        how = "mvar_jax.files.images.to_uint8 converts floats in [-1, 1]"
        raise file.refuse(f"{IMAGES} must hold uint8 pixels from 0 to 255, got {given}; {how}")
    if header.shape[3] == 4 and not allows_alpha:
        raise file.refuse(f"{IMAGES} must be grey or RGB, got {given}: Inception does not know alpha")
    if header.shape[3] not in MODES or 0 in header.shape:
        raise file.refuse(f"{IMAGES} must have shape [N, Y, X, 1 or 3] with at least one image, got {given}")
    return header.shape  # type: ignore[return-value]


def _read_gaussian(file: NpzFile, mean: str, covariance: str, width: int) -> Gaussian | None:
    """Return statistics, None if the file has neither array. Raises InputError if they are no covariance."""
    if mean not in file.headers and covariance not in file.headers:
        return None
    found = Gaussian(*(file.read(name, shape) for name, shape in ((mean, (width,)), (covariance, (width, width)))))
    found = Gaussian(*(x.astype(np.float64) for x in found))
    if not all(np.isfinite(x).all() for x in found):
        raise file.refuse(f"{mean} or {covariance} is not finite")
    scale = np.abs(found.covariance_DD).max()
    if np.abs(found.covariance_DD - found.covariance_DD.T).max() > SYMMETRY_TOLERANCE * scale:
        raise file.refuse(f"{covariance} must be symmetric, as a covariance is")
    return found
