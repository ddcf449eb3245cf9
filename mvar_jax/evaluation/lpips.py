"""LPIPS of pairs of images, and the files of its weights: torchvision's VGG16 and the heads of the lpips package."""

import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.evaluation.network_files import (
    Download,
    NetworkWeights,
    check_download,
    check_finite,
    check_out,
    load_network,
    missing,
    read_tensors,
    save_network,
)
from mvar_jax.files.paths import as_path
from mvar_jax.models.lpips import MIN_SIDE, STAGES, Lpips, shapes
from mvar_jax.ops.pixels import from_levels
from mvar_jax.sampling.inputs import ROUNDING
from mvar_jax.values import as_array, as_integer

FIELD = "lpips"
NETWORK = "lpips-0.1-vgg16"
BACKBONE = Download("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
HEADS = Download(
    "vgg.pth",
    "a78928a0",
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
)
COMMAND = f"mvar convert --lpips {BACKBONE.name} {HEADS.name} --out lpips.npz"
BATCH_SIZE = 16


def load_lpips(weights: str | os.PathLike | NetworkWeights, field: str = FIELD) -> NetworkWeights:
    """Return the weights of the file that `convert --lpips` wrote; loaded ones are returned. field: what errors name.

    Raises InputError if the file is missing, damaged or another one.
    """
    if isinstance(weights, NetworkWeights):
        return weights
    if not weights or not (path := as_path(weights, field)).is_file():
        raise missing(field, os.fspath(weights), (BACKBONE, HEADS), COMMAND)
    return load_network(field, path, NETWORK, shapes())


def convert_lpips(backbone: str | os.PathLike, heads: str | os.PathLike, out: str | os.PathLike) -> NetworkWeights:
    """Write torchvision's VGG16 and the heads of the lpips package as one .npz file.

    Raises InputError if a file is missing, damaged or another one, writing nothing.
    """
    out, sources, paths = check_out(out), {}, (as_path(backbone, FIELD), as_path(heads, FIELD))
    is_one_name = paths[0].name == paths[1].name  # in two folders; the published names tell them apart
    for path, download in zip(paths, (BACKBONE, HEADS), strict=True):
        if not path.exists():
            raise missing(FIELD, path, (download,), COMMAND)
        sources[download.name if is_one_name else path.name] = check_download(FIELD, path, download)
    params = params_of_torch(*paths)
    pairs = zip(sources.values(), (BACKBONE, HEADS), strict=True)
    is_published = all(sha256.startswith(download.sha256) for sha256, download in pairs)
    weights = NetworkWeights(NETWORK, params, sources, is_published)
    save_network(out, weights)
    return weights


def params_of_torch(backbone: Path, heads: Path) -> dict:
    """Return the parameters of both PyTorch files. Raises InputError if they do not hold them."""
    flat = flax.traverse_util.flatten_dict(shapes(), sep="/")
    numbers = [number for _, numbers in STAGES for number in numbers]
    kernels = {f"features.{n}.weight": flat[f"conv{n}/kernel"].shape for n in numbers}
    wanted = {name: (shape[3], shape[2], *shape[:2]) for name, shape in kernels.items()}
    wanted |= {f"features.{n}.bias": flat[f"conv{n}/bias"].shape for n in numbers}
    found = read_tensors(FIELD, backbone, wanted)
    rows = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, (width, _) in enumerate(STAGES)}
    heads_found = read_tensors(FIELD, heads, rows)
    check_finite(FIELD, backbone, found)
    check_finite(FIELD, heads, heads_found)
    params: dict[str, Any] = {f"head{i}": heads_found[name].reshape(-1) for i, name in enumerate(rows)}
    for n in numbers:
        kernel = np.ascontiguousarray(found[f"features.{n}.weight"].transpose(2, 3, 1, 0))
        params[f"conv{n}"] = {"kernel": kernel, "bias": found[f"features.{n}.bias"]}
    return params


compute_lpips = jax.jit(lambda params, a_BYX3, b_BYX3: Lpips().apply({"params": params}, a_BYX3, b_BYX3))


def lpips_distance(
    a_NYX3, b_NYX3, weights: str | os.PathLike | NetworkWeights, batch_size: int = BATCH_SIZE
) -> np.ndarray:
    """Return the LPIPS distance of each pair of images, `[N] float32`.

    Args:
      a_NYX3, b_NYX3: images `[N, Y, X, 3]` of 16 x 16 pixels or more, uint8 or floats in [-1, 1].
      weights: the file that `mvar convert --lpips` wrote, or what `load_lpips` returned.
      batch_size: pairs that are computed at a time.

    Raises:
      InputError: the images or the weights are not of this form.
    """
    a_NYX3, b_NYX3 = (as_array(x, "images", "arrays [N, Y, X, 3]") for x in (a_NYX3, b_NYX3))
    if a_NYX3.shape != b_NYX3.shape:
        raise _refuse("have equal shapes", f"{list(a_NYX3.shape)} and {list(b_NYX3.shape)}")
    num, params = len(_check_images(a_NYX3)), dict(load_lpips(weights).params)
    size, found = min(as_integer(batch_size, "batch_size", 1), len(_check_images(b_NYX3))), []
    for begin in range(0, num, size):
        rows = np.minimum(np.arange(begin, begin + size), num - 1)  # one shape, so one program
        pair = (from_levels(x[rows]) if x.dtype == np.uint8 else x[rows].astype(np.float32) for x in (a_NYX3, b_NYX3))
        found.append(np.asarray(compute_lpips(params, *pair)))
    return np.concatenate(found)[:num]


def _check_images(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[3] != 3 or len(images) == 0 or min(images.shape[1:3]) < MIN_SIDE:
        raise _refuse("have shape [N, Y, X, 3] with at least one image of 16 x 16 pixels", str(list(images.shape)))
    if images.dtype != np.uint8:
        is_float = jnp.issubdtype(images.dtype, jnp.floating)
        low, high = (float(images.min()), float(images.max())) if is_float else (np.nan, np.nan)
        if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):  # NaN too
            raise _refuse("be uint8 or floats in [-1, 1]", f"{images.dtype} from {low:.4g} to {high:.4g}")
    return images


def _refuse(expected: str, given: str) -> InputError:
    return InputError(f"images must {expected}, got {given}", field="images", given=given, expected=expected)
