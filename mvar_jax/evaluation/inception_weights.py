"""Weights of the Inception network: from the public PyTorch file, the TensorFlow graph, or our own file."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.convert.tf_graph import read_constants
from mvar_jax.evaluation.inception import BLOCKS, NUM_CLASSES, POOL_WIDTH, STEM, Inception, Unit
from mvar_jax.evaluation.network_files import (
    OWN_SUFFIX,
    Download,
    NetworkWeights,
    check_download,
    check_finite,
    check_out,
    find_misfits,
    load_network,
    misfit,
    missing,
    read_tensors,
    save_network,
)
from mvar_jax.files.paths import as_path

FIELD = "inception"
NETWORK = "inception-2015-12-05"
DOWNLOAD = Download(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
COMMAND = f"mvar convert --inception {DOWNLOAD.name} --out inception.npz"
GRAPH_SUFFIX = ".pb"
BATCH_NORM_EPS = 1e-3
# names of a unit's tensors: the kernel, then gamma, beta, mean and variance of its batch norm
TORCH_NAMES = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
GRAPH_NAMES = tuple(f"batchnorm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance"))


@functools.cache
def shapes() -> dict:
    """Return the network's parameter tree as shapes."""
    pixels = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)
    return jax.eval_shape(Inception().init, jax.random.key(0), pixels)["params"]


def load_inception(weights: str | os.PathLike | NetworkWeights) -> NetworkWeights:
    """Return the network's weights.

    weights: the file that `convert --inception` wrote (.npz), the public PyTorch file or the TensorFlow graph (.pb);
    weights that are loaded already are returned. Raises InputError if the file is missing, damaged or another one.
    """
    if isinstance(weights, NetworkWeights):
        return weights
    path = as_path(weights, FIELD)
    if not path.exists():
        raise missing(FIELD, path, (DOWNLOAD,), COMMAND)
    if path.suffix == OWN_SUFFIX:
        return load_network(FIELD, path, NETWORK, shapes())
    sha256, is_graph = check_download(FIELD, path, DOWNLOAD), path.suffix == GRAPH_SUFFIX
    params = params_of_graph(path) if is_graph else params_of_torch(path)
    check_finite(FIELD, path, params)
    is_published = None if is_graph else sha256.startswith(DOWNLOAD.sha256)
    return NetworkWeights(NETWORK, params, {path.name: sha256}, is_published)


def convert_inception(path: str | os.PathLike, out: str | os.PathLike) -> NetworkWeights:
    """Write the weights of a download as one .npz file. Raises InputError as `load_inception`, writing nothing."""
    out = check_out(out)
    weights = load_inception(path)
    save_network(out, weights)
    return weights


def unit_shapes() -> dict[str, tuple[int, ...]]:
    """Return the kernel's shape of each unit by its name, such as Mixed_5b.branch1x1."""
    flat = flax.traverse_util.flatten_dict(shapes(), sep=".")
    return {name.removesuffix(".kernel"): x.shape for name, x in flat.items() if name.endswith(".kernel")}


def params_of_torch(path: Path) -> dict:
    """Return the parameters of the PyTorch file. Raises InputError if it does not hold them."""
    wanted = {"fc.weight": (NUM_CLASSES, POOL_WIDTH)}
    for unit, (rows, columns, num_in, num_out) in units().items():
        wanted |= {f"{unit}.{name}": (num_out,) for name in TORCH_NAMES[1:]}
        wanted[f"{unit}.{TORCH_NAMES[0]}"] = (num_out, num_in, rows, columns)
    tensors = read_tensors(FIELD, path, wanted)

    def tensors_of(unit: str) -> list[np.ndarray]:
        kernel, *norm = (tensors[f"{unit}.{name}"] for name in TORCH_NAMES)
        return [kernel.transpose(2, 3, 1, 0), *norm]

    return make_params(tensors_of, tensors["fc.weight"].T)


def params_of_graph(path: Path) -> dict:
    """Return the parameters of the TensorFlow graph. Raises InputError if it does not hold them."""
    scopes = graph_scopes()
    wanted = {"softmax/weights": (POOL_WIDTH, NUM_CLASSES)}
    for unit, shape in units().items():
        wanted[f"{scopes[unit]}/conv2d_params"] = shape
        wanted |= {f"{scopes[unit]}/{name}": shape[-1:] for name in GRAPH_NAMES}
    constants = read_constants(FIELD, path)
    if misfits := find_misfits(wanted, {name: value.shape for name, value in constants.items()}):
        raise misfit(FIELD, path, misfits)
    tensors_of = lambda unit: [constants[f"{scopes[unit]}/{name}"] for name in ("conv2d_params", *GRAPH_NAMES)]
    return make_params(tensors_of, constants["softmax/weights"])


def units() -> dict[str, tuple[int, ...]]:
    """Return the kernel's shape of each unit with a batch norm."""
    return {name: shape for name, shape in unit_shapes().items() if name != "fc"}


def make_params(tensors_of, fc_kernel: np.ndarray) -> dict:
    """Return the parameter tree. tensors_of: unit -> its kernel HWIO, gamma, beta, mean and variance."""
    flat = {"fc.kernel": np.ascontiguousarray(fc_kernel, np.float32)}
    for unit in units():
        flat[f"{unit}.kernel"], flat[f"{unit}.bias"] = fold(*tensors_of(unit))
    return flax.traverse_util.unflatten_dict(flat, sep=".")


def fold(kernel_YXio, gamma_o, beta_o, mean_o, variance_o) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias of a convolution that includes the batch norm after it, computed in float64."""
    scale_o = np.asarray(gamma_o, np.float64) / np.sqrt(np.asarray(variance_o, np.float64) + BATCH_NORM_EPS)
    kernel = np.ascontiguousarray(kernel_YXio * scale_o, np.float32)
    return kernel, (beta_o - mean_o * scale_o).astype(np.float32)


def graph_scopes() -> Mapping[str, str]:
    """Return the scope of each unit in the graph: `conv`, `tower` and `mixed`, numbered in the order of units."""
    stem = [step.name for step in STEM if isinstance(step, Unit)]
    scopes = dict(zip(stem, numbered("conv"), strict=False))
    for (block, branches), scope in zip(BLOCKS.items(), numbered("mixed"), strict=False):
        towers = numbered("tower")
        for branch in branches:
            steps = [step for step in branch if not isinstance(step, str)]
            is_direct = len(steps) == 1 and isinstance(steps[0], Unit) and steps[0].pool is None
            base = scope if is_direct or not steps else f"{scope}/{next(towers)}"
            for step, name in zip(steps, numbered("conv"), strict=False):
                pairs = [(step, name)] if isinstance(step, Unit) else zip(step, numbered("mixed/conv"), strict=False)
                scopes |= {f"{block}.{unit.name}": f"{base}/{place}" for unit, place in pairs}
    return scopes


def numbered(name: str) -> Any:
    """Yield name, name_1, name_2, ... as TensorFlow makes names unique."""
    yield name
    i = 0
    while True:
        i += 1
        yield f"{name}_{i}"
