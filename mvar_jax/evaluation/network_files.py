"""Weights of the networks that score images: the public downloads, and the .npz file that they are converted to.

Nothing is downloaded here. A missing or damaged file ends with a sentence that names the file, the beginning of its
SHA-256 and the commands that bring it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import flax.traverse_util
import numpy as np

from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.tensors import Tensor
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.json_files import parse_json
from mvar_jax.files.npz import save_npz
from mvar_jax.files.npz_reader import NpzFile
from mvar_jax.files.paths import as_path
from mvar_jax.schema import conform

ABOUT = "about"  # the array with a line of JSON
FORMAT = 1
MAX_JSON_BYTES = 1 << 20
OWN_SUFFIX = ".npz"
SHOWN_MISFITS = 3
PART_BYTES = 1 << 22
FLOAT_KINDS = ("float16", "bfloat16", "float32", "float64")


class About(TypedDict):
    """What `about` holds."""

    format: int
    network: str
    sources: dict[str, str]
    is_published: bool | None


class Download(NamedTuple):
    """A public file of weights and the beginning of its SHA-256, "" if it is not published."""

    name: str
    sha256: str
    url: str


@dataclass(frozen=True)
class NetworkWeights:
    """The weights of a network and where they came from.

    Attributes:
      network: the name of the network that they belong to.
      params: its parameter tree, float32 numpy.
      sources: name -> SHA-256 of each file that the weights were read from, the fingerprint of the network.
      is_published: whether these are the files behind published scores. None if their checksum is not known.
    """

    network: str
    params: Mapping[str, Any]
    sources: Mapping[str, str]
    is_published: bool | None


def check_download(field: str, path: Path, download: Download) -> str:
    """Return the SHA-256 of a download. Raises InputError if it is no file, or not what its name promises."""
    if not path.is_file():  # a pipe would block
        message = f"{field} must be a regular file, got {path}"
        raise InputError(message, field=field, given=str(path), expected="a regular file")
    found = sha256_of(path)
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)  # as torch.hub names its files
    if promised and not found.startswith(promised[1]):
        message = (
            f"{field}={path} must have a SHA-256 that begins with {promised[1]}, got {found}: "
            f"the download is damaged; get it again from {download.url}"
        )
        raise InputError(message, field=field, given=found, expected=promised[1])
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def missing(field: str, path: Path | str, downloads: tuple[Download, ...], command: str) -> InputError:
    """Return the error of a file that is not there: what it is, its checksum, and the commands that make it."""
    checksum = lambda x: f" (SHA-256 {x.sha256}...)" if x.sha256 else ""
    files = " and ".join(f"{x.name}{checksum(x)} from {x.url}" for x in downloads)
    message = f"{field}={path} is missing: download {files}, then run `{command}`"
    return InputError(message, field=field, given=str(path), expected=f"{downloads[0].name}, or its conversion")


def read_tensors(field: str, path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the tensors of a file of PyTorch or safetensors by name, float32; others in the file are not read.

    Raises InputError if one is missing or of another shape, or if the file cannot be read.
    """
    with open_weights(field, path) as file:
        content = file.content if isinstance(file.content, dict) else {}
        found = {name: x for name in shapes if isinstance(x := content.get(name), Tensor)}
        misfits = find_misfits(shapes, {name: x.shape for name, x in found.items()})
        misfits += [f"{name} is {x.dtype}" for name, x in found.items() if x.dtype not in FLOAT_KINDS]
        if misfits:
            raise misfit(field, path, misfits)
        return {name: file.read(x).astype(np.float32) for name, x in found.items()}


def find_misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a line for each tensor that is missing or of another shape."""
    lines = []
    for name, shape in wanted.items():
        if name not in found:
            lines.append(f"{name} {list(shape)} is missing")
        elif found[name] != shape:
            lines.append(f"{name} {list(shape)} has shape {list(found[name])}")
    return lines


def misfit(field: str, path: Path, misfits: list[str]) -> InputError:
    """Return the error of a file whose tensors do not fit."""
    more = f"; and {len(misfits) - SHOWN_MISFITS} more" if len(misfits) > SHOWN_MISFITS else ""
    shown = "; ".join(misfits[:SHOWN_MISFITS]) + more
    message = f"{field}={path} does not hold the network's weights: {len(misfits)} do not fit: {shown}"
    return InputError(message, field=field, given=str(path), expected="the network's weights")


def check_finite(field: str, path: Path, params: Mapping[str, Any]) -> None:
    """Raise InputError if a weight is not finite."""
    for name, value in flax.traverse_util.flatten_dict(params, sep="/").items():
        if not np.isfinite(value).all():
            message = f"{field}={path} holds values that are not finite in {name}; download it again"
            raise InputError(message, field=field, given=str(path), expected="finite weights")


def check_out(out: str | os.PathLike) -> Path:
    """Return the path of a file to write. Raises InputError unless it ends in .npz and is new."""
    path, expected = as_path(out, "out"), f"a new file that ends in {OWN_SUFFIX}"
    if path.suffix != OWN_SUFFIX or path.exists():
        message = f"out must be {expected}, got {path}{', which exists' if path.exists() else ''}"
        raise InputError(message, field="out", given=str(path), expected=expected)
    return path


def save_network(path: Path, weights: NetworkWeights) -> None:
    """Write weights as one .npz file: an array for each parameter, and their origin as JSON."""
    about = {"format": FORMAT, "network": weights.network, "sources": dict(weights.sources)}
    text = json.dumps(about | {"is_published": weights.is_published})
    save_npz(path, about=np.array([text]), **flax.traverse_util.flatten_dict(weights.params, sep="/"))


def load_network(field: str, path: Path, network: str, shapes: Mapping[str, Any]) -> NetworkWeights:
    """Read a file of `save_network`.

    Args:
      network: the name that it must have.
      shapes: the network's parameter tree as shapes; nothing else is read.

    Raises InputError if the file is damaged or holds another network.
    """
    with NpzFile(field, path) as file:
        about = read_json_array(file, ABOUT, About)
        if (about["format"], about["network"]) != (FORMAT, network):
            raise file.refuse(f"it holds {about['network']!r} in format {about['format']!r}, not {network}")
        wanted = flax.traverse_util.flatten_dict(shapes, sep="/")
        arrays = {name: file.read(name, tuple(x.shape)).astype(np.float32, copy=False) for name, x in wanted.items()}
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    check_finite(field, path, params)
    return NetworkWeights(network, params, about["sources"], about["is_published"])


def read_json_array(file: NpzFile, name: str, kind: Any) -> Any:
    """Return the JSON text that an array holds. Raises InputError if it is missing or of another type than `kind`."""
    if file.header(name, (1,), "U").num_bytes > MAX_JSON_BYTES:
        raise file.refuse(f"{name} is longer than {MAX_JSON_BYTES} bytes")
    text = str(file.read(name, (1,), "U")[0])
    try:
        return conform(parse_json(text), kind, name)
    except ValueError as error:  # an InputError is one
        raise file.refuse(shorten(error)) from None
