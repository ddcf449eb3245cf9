"""Files of safetensors, read and written without torch."""

import json
import os
import re
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from mvar_jax.convert.files import AGAIN, WeightsFile
from mvar_jax.convert.tensors import Tensor
from mvar_jax.errors import InputError, find_storage_error, shorten
from mvar_jax.files.paths import is_store

MAX_HEADER_BYTES = 8 << 20
INDEX_SUFFIX = ".index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
# the format's name of a dtype -> numpy's
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}


class SafetensorsFile(WeightsFile):
    """An open file of safetensors; the package checks that the header fits the bytes."""

    def __init__(self, field: str, path: Path, file: BinaryIO):
        super().__init__(field, path)
        try:
            with file:
                header = self._read_header(file)
                local = path
                if is_store(path):
                    local = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="mvar_"))) / "weights"
                    path.download(local)  # type: ignore[attr-defined]
            self._tensors = self._opened.enter_context(safetensors.safe_open(os.fspath(local), framework="np"))
            slices = {name: self._tensors.get_slice(name) for name in list(self._tensors.keys())}
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            self.close()
            if isinstance(error, InputError):
                raise
            raise self.refuse(shorten(error)) from None
        self.content = {
            name: Tensor(tuple(x.get_shape()), DTYPES.get(x.get_dtype(), x.get_dtype()), name)
            for name, x in slices.items()
        }
        if header.keys() - {"__metadata__"} != self.content.keys():
            self.close()
            raise self.refuse("its header cannot be read in one way only")

    def read(self, tensor: Tensor) -> np.ndarray:
        if tensor.dtype not in DTYPES.values():
            raise self.refuse(f"{tensor.place} is {tensor.dtype}, which is not read")
        try:
            return self._tensors.get_tensor(tensor.place)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise self.refuse(f"{tensor.place}: {shorten(error)}") from None

    def _read_header(self, file: BinaryIO) -> dict:
        """Return the header. Raises InputError if it is too long, names a tensor twice or is of a longer file."""
        self.num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        num_header_bytes = struct.unpack("<Q", file.read(8))[0]
        if num_header_bytes > MAX_HEADER_BYTES:
            limit = f"at most {MAX_HEADER_BYTES} are read"
            raise self.refuse(f"its header would have {num_header_bytes} bytes; {limit}")
        header = parse_object(self, file.read(num_header_bytes))
        spans = [value.get("data_offsets") for value in header.values() if isinstance(value, dict)]
        ends = [span[1] for span in spans if isinstance(span, list) and len(span) == 2 and type(span[1]) is int]
        num_needed = 8 + num_header_bytes + max(ends, default=0)
        if num_needed > self.num_bytes:
            raise self.refuse(f"it ends after {self.num_bytes} of {num_needed} bytes; {AGAIN}")
        return header


def parse_object(file: WeightsFile, data: bytes) -> dict:
    """Parse an object. Raises InputError if it is none, or if a key appears twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it names {twice[:100]!a} twice")
        return found

    try:
        content = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise file.refuse(f"its JSON cannot be read: {shorten(error)}") from None
    if not isinstance(content, dict):
        raise file.refuse("its JSON is no object")
    return content


def write_safetensors(folder: Path, name: str, tensors: dict[str, np.ndarray], shard_mib: int | None) -> list[str]:
    """Write arrays as NAME.safetensors; return the names of the files, the one to read first.

    shard_mib: the most that a file shall hold. If the arrays need more, they are split as Hugging Face's programs do,
    into NAME-00001-of-00002.safetensors and so on, with NAME.safetensors.index.json.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    num_bytes = 0
    for key, array in tensors.items():
        if shard_mib is not None and shards[-1] and num_bytes + array.nbytes > shard_mib << 20:
            shards.append({})
            num_bytes = 0
        shards[-1][key] = np.asarray(array, order="C")
        num_bytes += array.nbytes
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, shard)
    if len(shards) == 1:
        return names
    places = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": places}
    first = f"{name}.safetensors{INDEX_SUFFIX}"
    (folder / first).write_text(json.dumps(index, indent=1) + "\n")
    return [first, *names]


def _write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise find_storage_error(error, path) or error from None
    path.chmod(mode)  # the package lets nobody else read its files
