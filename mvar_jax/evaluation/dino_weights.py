"""Weights of the frozen network of a DINO discriminator: from the public PyTorch file, or our own file."""

import dataclasses
import math
import os
from pathlib import Path

import flax.traverse_util
import numpy as np

from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.tensors import Tensor
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
from mvar_jax.models.dino import BLOCK_SHAPES, DEPTH, GRID, PATCH, WIDTH, shapes
from mvar_jax.ops.resize import bicubic_matrix

FIELD = "dino"
NETWORK = "dino-vit-small-16"
DOWNLOAD = Download(
    "dino_deitsmall16_pretrain.pth",
    "",
    "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
)
COMMAND = f"mvar convert --dino {DOWNLOAD.name} --out dino.npz"
MAX_GRID = 128
# our names of a block's layers -> PyTorch's
LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def load_dino(weights: str | os.PathLike | NetworkWeights, field: str = FIELD) -> NetworkWeights:
    """Return the weights of the file that `convert --dino` wrote; loaded ones are returned. field: what errors name.

    `params` belong in the collection "frozen" as {"vit": params}. Raises InputError if the file is missing, damaged
    or another one.
    """
    if isinstance(weights, NetworkWeights):
        return weights
    if not weights or not (path := as_path(weights, field)).is_file():
        raise missing(field, os.fspath(weights), (DOWNLOAD,), COMMAND)
    weights = load_network(field, path, NETWORK, _tree(shapes()))
    flat = flax.traverse_util.flatten_dict(dict(weights.params), sep="/")
    return dataclasses.replace(weights, params=flat)


def _tree(flat: dict) -> dict:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def convert_dino(path: str | os.PathLike, out: str | os.PathLike) -> NetworkWeights:
    """Write the public file as one .npz file. Raises InputError if it is missing or another one, writing nothing."""
    out, path = check_out(out), as_path(path, FIELD)
    if not path.exists():
        raise missing(FIELD, path, (DOWNLOAD,), COMMAND)
    sha256 = check_download(FIELD, path, DOWNLOAD)
    params = params_of_torch(path)
    check_finite(FIELD, path, params)
    weights = NetworkWeights(NETWORK, params, {path.name: sha256}, None)
    save_network(out, weights)
    return weights


def params_of_torch(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters of the PyTorch file, positions of another square grid interpolated."""
    grid = _grid_of(path)
    wanted: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    names = {(name, i): _published(name, i) for name in BLOCK_SHAPES for i in range(DEPTH)}
    wanted |= {names[name, i]: BLOCK_SHAPES[name][::-1] for name, i in names}
    found = read_tensors(FIELD, path, wanted)
    params = {
        "class_token": found["cls_token"].reshape(WIDTH),
        "positions": _positions(found["pos_embed"][0], grid),
        "embed/kernel": found["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embed/bias": found["patch_embed.proj.bias"],
    }
    for name in BLOCK_SHAPES:
        params[f"blocks/{name}"] = np.stack([found[names[name, i]].T for i in range(DEPTH)])
    return {name: np.ascontiguousarray(x) for name, x in params.items()}


def _published(name: str, block: int) -> str:
    layer, end = name.split("/")
    return f"blocks.{block}.{LAYERS[layer]}.{'bias' if end == 'bias' else 'weight'}"


def _grid_of(path: Path) -> int:
    """Return the side of the grid of positions that a file has, GRID if they are no square grid."""
    with open_weights(FIELD, path) as file:
        positions = file.content.get("pos_embed") if isinstance(file.content, dict) else None
        shape = positions.shape if isinstance(positions, Tensor) else ()
    if len(shape) != 3 or not 1 < shape[1] <= 1 + MAX_GRID**2:
        return GRID
    side = math.isqrt(shape[1] - 1)
    return side if side * side == shape[1] - 1 else GRID


def _positions(rows_NC: np.ndarray, grid: int) -> np.ndarray:
    if grid == GRID:
        return rows_NC
    matrix, maps = bicubic_matrix(grid, GRID), rows_NC[1:].reshape(grid, grid, WIDTH)
    maps = np.einsum("iy,jx,yxc->ijc", matrix, matrix, maps)
    return np.concatenate([rows_NC[:1], maps.reshape(GRID**2, WIDTH)])
