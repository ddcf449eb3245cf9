"""Local-window attention by tiles: a tile of queries attends, masked, to the halo of keys that its windows cover.

Halos are cut by static slices, not gathered: the backward pass of a gather is a scatter-add. `band` is the
case of tiles as wide as the map. Work per query is the halo's size, so a small tile wastes least and a large
one makes the larger matrix products.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.attention import MASKED
from mvar_jax.ops.window.geometry import window_starts

TILE = (4, 4)
BAND_ROWS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class AxisPlan:
    """How one axis is cut. tile: queries of a tile; halo: keys of a tile; starts: first key of each tile's
    halo; mask: bool [tiles, tile, halo], which keys each query sees."""

    tile: int
    halo: int
    starts: tuple[int, ...]
    mask: np.ndarray

    @property
    def num_tiles(self) -> int:
        return len(self.starts)


@functools.lru_cache(maxsize=128)
def plan_axis(length: int, tile: int, kernel_size: int) -> AxisPlan:
    """Cuts an axis into tiles of at most `tile` queries; the last one may reach beyond the end."""
    kernel_size, tile = min(kernel_size, length), min(tile, length)
    halo = min(tile + kernel_size - 1, length)
    first = window_starts(length, kernel_size)
    tiles = np.arange(0, length, tile)
    starts = np.minimum(first[tiles], length - halo)
    queries = np.minimum(tiles[:, None] + np.arange(tile), length - 1)
    keys = (starts[:, None] + np.arange(halo))[:, None]
    mask = (keys >= first[queries][..., None]) & (keys < first[queries][..., None] + kernel_size)
    return AxisPlan(tile, halo, tuple(starts.tolist()), mask)


def cut_halos(x_BYXHK: jax.Array, rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """[B, Y, X, H, K] -> [B, tiles, keys of a halo, H, K]."""
    x = jnp.stack([x_BYXHK[:, a : a + rows.halo] for a in rows.starts], axis=1)
    x = jnp.stack([x[:, :, :, a : a + columns.halo] for a in columns.starts], axis=2)
    B, *_, H, K = x.shape
    return x.reshape(B, rows.num_tiles * columns.num_tiles, rows.halo * columns.halo, H, K)


def cut_tiles(x_BYXHK: jax.Array, rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """[B, Y, X, H, K] -> [B, tiles, queries of a tile, H, K], padded with zeros to whole tiles."""
    B, Y, X, H, K = x_BYXHK.shape
    ny, nx = rows.num_tiles, columns.num_tiles
    pad = ((0, 0), (0, ny * rows.tile - Y), (0, nx * columns.tile - X), (0, 0), (0, 0))
    x = jnp.pad(x_BYXHK, pad).reshape(B, ny, rows.tile, nx, columns.tile, H, K)
    return x.swapaxes(2, 3).reshape(B, ny * nx, rows.tile * columns.tile, H, K)


def join_tiles(x_BTQHK: jax.Array, shape: tuple[int, ...], rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """The inverse of `cut_tiles`; shape is that of the map."""
    B, Y, X, H, K = shape
    ny, nx = rows.num_tiles, columns.num_tiles
    x = x_BTQHK.reshape(B, ny, nx, rows.tile, columns.tile, H, K).swapaxes(2, 3)
    return x.reshape(B, ny * rows.tile, nx * columns.tile, H, K)[:, :Y, :X]


def tile_mask(rows: AxisPlan, columns: AxisPlan) -> np.ndarray:
    """bool [tiles, 1, queries, halo keys]."""
    mask = rows.mask[:, None, :, None, :, None] & columns.mask[None, :, None, :, None, :]
    queries, keys = rows.tile * columns.tile, rows.halo * columns.halo
    return mask.reshape(rows.num_tiles * columns.num_tiles, 1, queries, keys)


def attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float, tile: tuple[int, int]) -> jax.Array:
    """Local-window attention by tiles of that many rows and columns of queries."""
    Y, X = q_BYXHK.shape[1:3]
    rows, columns = plan_axis(Y, tile[0], kernel_size), plan_axis(X, tile[1], kernel_size)
    q = cut_tiles(q_BYXHK, rows, columns)
    k, v = cut_halos(k_BYXHK, rows, columns), cut_halos(v_BYXHK, rows, columns)
    logits = jnp.einsum("btqhd,btkhd->bthqk", q, k, preferred_element_type=jnp.float32) * scale
    logits = logits + jnp.where(jnp.asarray(tile_mask(rows, columns)), 0.0, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bthqk,btkhd->btqhd", weights, v)
    return join_tiles(out, q_BYXHK.shape, rows, columns)


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Square tiles; see `local_window_attention`."""
    return attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size, scale, TILE)


def attend_bands(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float) -> jax.Array:
    """Bands of whole rows; see `local_window_attention`."""
    return attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size, scale, (BAND_ROWS, q_BYXHK.shape[2]))
