"""The file of weights that a path names, whatever its format; the bytes decide, not the name."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mvar_jax.convert.files import NUM_HEAD_BYTES, WeightsFile, explain, open_regular, refuse
from mvar_jax.convert.safetensors_files import INDEX_SUFFIX, MAX_HEADER_BYTES, SHARD, SafetensorsFile, parse_object
from mvar_jax.convert.tensors import Tensor
from mvar_jax.convert.torch_files import LegacyTorchFile, ZippedTorchFile
from mvar_jax.errors import shorten
from mvar_jax.files.paths import as_path


def open_weights(field: str, path: str | os.PathLike) -> WeightsFile:
    """Open a file of torch.save (zipped or of the older format), of safetensors, or the index of a sharded one.

    Nothing of a file is run. Raises InputError if the file is unreadable, damaged, of another kind, or would take
    more memory or work than weights do.
    """
    path = as_path(path, field)
    head, file = _open(field, path)
    if b"\0" not in head and head.lstrip().startswith(b"{"):
        return ShardedFile(field, path, file).open_shards()
    shard = SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        file.close()
        raise refuse(field, path, f"it is one of {int(shard[2])} shards; give {shard[1]}.safetensors{INDEX_SUFFIX}")
    return _read(field, path, head, file)


def _open(field: str, path: Path) -> tuple[bytes, BinaryIO]:
    file = open_regular(field, path)
    try:
        head = file.read(NUM_HEAD_BYTES)
        file.seek(0)
        return head, file
    except OSError as error:
        file.close()
        raise refuse(field, path, shorten(error)) from None


def _read(field: str, path: Path, head: bytes, file: BinaryIO) -> WeightsFile:
    if head[8:9] == b"{":  # first, since the length before it may begin as the others do
        return SafetensorsFile(field, path, file)
    if head.startswith(b"PK"):
        return ZippedTorchFile(field, path, file)
    if head.startswith(b"\x80"):
        return LegacyTorchFile(field, path, file)
    file.close()
    raise refuse(field, path, explain(head))


def shards_of(field: str, path: Path) -> list[str]:
    """Return the names of the files that an index names."""
    return ShardedFile(field, path, open_regular(field, path)).shards


class ShardedFile(WeightsFile):
    """The index of weights in several files: `weight_map` names the file of each tensor."""

    def __init__(self, field: str, path: Path, file: BinaryIO):
        super().__init__(field, path)
        with file:
            self.places = self._read_places(file)
        self.content, self.num_bytes = {}, 0

    def open_shards(self) -> "ShardedFile":
        """Open the files that the index names. Raises InputError unless they hold what it says."""
        try:
            for name in self.shards:
                self._add_shard(self.path.parent / name, {key for key in self.places if self.places[key] == name})
        except BaseException:
            self.close()
            raise
        return self

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.places.values()))

    def _read_places(self, file: BinaryIO) -> dict[str, str]:
        try:
            data = file.read(MAX_HEADER_BYTES)
        except OSError as error:
            raise self.refuse(shorten(error)) from None
        places = parse_object(self, data).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise self.refuse("it is JSON without the weight_map of an index of safetensors")
        for name in places.values():
            if type(name) is not str or Path(name).name != name:
                raise self.refuse(f"its weight_map must name files beside it, got {str(name)[:100]!a}")
        return places

    def read(self, tensor: Tensor) -> np.ndarray:
        shard, place = tensor.place
        return shard.read(place)

    def _add_shard(self, path: Path, names: set[str]) -> None:
        shard = self._opened.enter_context(_read(self.field, path, *_open(self.field, path)))
        content = shard.content if isinstance(shard.content, dict) else {}
        if content.keys() != names:
            wrong = min(map(str, content.keys() ^ names))
            verb = "holds" if wrong in content else "lacks"
            raise self.refuse(f"{path.name} {verb} {wrong[:100]!a}, unlike its weight_map says")
        self.num_bytes += shard.num_bytes
        for name, tensor in content.items():
            is_tensor = isinstance(tensor, Tensor)
            self.content[name] = tensor._replace(place=(shard, tensor)) if is_tensor else tensor
