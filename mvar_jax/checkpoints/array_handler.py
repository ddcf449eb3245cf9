"""Orbax's reading and writing of arrays, with checksums: Orbax has no option to add the crc32c codec to its own.

What is written is plain zarr3, which any Orbax reads. Each process reads and writes only what its devices hold.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.type_handlers import ParamInfo, RestoreArgs, SaveArgs

from mvar_jax.checkpoints import arrays
from mvar_jax.checkpoints.arrays import Layout, Piece
from mvar_jax.checkpoints.pieces import layout_of, own_pieces, whole_pieces


class ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Reads and writes jax.Array. Arrays of version 0.1, in Orbax's OCDBT, are left to Orbax."""

    async def metadata(self, infos: Sequence[ParamInfo]) -> Sequence[Any]:
        """Return the shapes and dtypes of stored arrays. Raises ReadError."""
        if infos[0].is_ocdbt_checkpoint:
            return await super().metadata(infos)
        folder = infos[0].parent_dir
        layouts = arrays.read_layouts(folder, [info.name for info in infos])
        return [
            ocp.metadata.ArrayMetadata(
                name=info.name,
                directory=folder,
                shape=layout.shape,
                sharding=None,
                dtype=np.dtype(layout.dtype),
                storage=ocp.metadata.StorageMetadata(chunk_shape=layout.chunk_shape),
            )
            for info, layout in zip(infos, layouts, strict=True)
        ]

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[ParamInfo], args: Sequence[SaveArgs] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Copy this process's part of the arrays to the host, and start writing it in the background."""
        named = [(info.name, value) for info, value in zip(infos, values, strict=True)]
        write = _write(infos, self._layouts(values), self._pieces(named))
        return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="write_arrays")]

    async def deserialize(
        self, infos: Sequence[ParamInfo], args: Sequence[RestoreArgs] | None = None
    ) -> Sequence[jax.Array]:
        """Read this process's shards. Raises ReadError."""
        if infos[0].is_ocdbt_checkpoint:
            return await super().deserialize(infos, args)
        wanted = [(info.name, arg.sharding) for info, arg in zip(infos, args or (), strict=True)]
        return arrays.read(infos[0].parent_dir, wanted)

    def _layouts(self, values: Sequence[Any]) -> list[Layout]:
        return [layout_of(value) for value in values]

    def _pieces(self, named: Sequence[tuple[str, Any]]) -> list[Piece]:
        return own_pieces(named)


class HostArrayHandler(ArrayHandler):
    """Writes np.ndarray."""

    def typestr(self) -> str:
        """Return Orbax's name of the type."""
        return ocp.type_handlers.NumpyHandler().typestr()

    def _layouts(self, values: Sequence[np.ndarray]) -> list[Layout]:
        return [Layout.of(value.dtype, value.shape, value.shape) for value in values]

    def _pieces(self, named: Sequence[tuple[str, np.ndarray]]) -> list[Piece]:
        return whole_pieces(named)


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Return Orbax's handler of trees with these handlers of arrays."""
    types = ((jax.Array, ArrayHandler()), (np.ndarray, HostArrayHandler()))
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*types),
    )


async def _write(infos: Sequence[ParamInfo], layouts: Sequence[Layout], pieces: list[Piece]) -> None:
    for info in infos:
        await info.await_path_creation()
    folder = infos[0].parent_dir
    arrays.write(folder, pieces)
    if jax.process_index() == 0:
        arrays.write_layouts(folder, {info.name: layout for info, layout in zip(infos, layouts, strict=True)})
