"""Local-window attention by tiles: a tile of queries attends, masked, to the halo of keys that its windows cover.

Halos are cut by static slices, not gathered, since the backward pass of a gather is a scatter-add. `band` uses
tiles as wide as the map. Work per query is the halo's size: a small tile wastes less work, a large one makes larger
matrix products. Samples and heads are processed in chunks whose logits fit a cache; the backward pass recomputes
them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.ops.attention import softmax_attention
from mvar_jax.ops.per_device import per_device
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.window.geometry import window_starts

TILE = (8, 8)
BAND_ROWS = 4
# logits computed at once: they fit a CPU's cache, or a small part of an accelerator's memory
LOGITS_TOGETHER = {"cpu": 2**19, "gpu": 2**26, "tpu": 2**26}


@dataclasses.dataclass(frozen=True, eq=False)
class AxisPlan:
    """The tiles of one axis.

    Attributes:
      tile, halo: number of queries and of keys of a tile.
      starts: first key of each tile's halo.
      mask: `[tiles, tile, halo] bool`, the keys that each query sees.
    """

    tile: int
    halo: int
    starts: tuple[int, ...]
    mask: np.ndarray

    @property
    def num_tiles(self) -> int:
        return len(self.starts)


@functools.lru_cache(maxsize=128)
def plan_axis(length: int, tile: int, kernel_size: int) -> AxisPlan:
    """Cut an axis into tiles of at most `tile` queries; the last one may extend beyond the end."""
    kernel_size, tile = min(kernel_size, length), min(tile, length)
    halo = min(tile + kernel_size - 1, length)
    first = window_starts(length, kernel_size)
    tiles = np.arange(0, length, tile)
    starts = np.minimum(first[tiles], length - halo)
    queries = np.minimum(tiles[:, None] + np.arange(tile), length - 1)
    keys = (starts[:, None] + np.arange(halo))[:, None]
    mask = (keys >= first[queries][..., None]) & (keys < first[queries][..., None] + kernel_size)
    return AxisPlan(tile, halo, tuple(starts.tolist()), mask)


def cut_halos(x_GYXK: jax.Array, rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """Cut `[G, Y, X, K]` into halos `[G, tiles, keys of a halo, K]`; G counts samples and heads."""
    x = jnp.stack([x_GYXK[:, a : a + rows.halo] for a in rows.starts], axis=1)
    x = jnp.stack([x[:, :, :, a : a + columns.halo] for a in columns.starts], axis=2)
    return x.reshape(x.shape[0], rows.num_tiles * columns.num_tiles, rows.halo * columns.halo, x.shape[-1])


def cut_tiles(x_GYXK: jax.Array, rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """Cut `[G, Y, X, K]` into tiles `[G, tiles, queries of a tile, K]`, padded with zeros to whole tiles."""
    G, Y, X, K = x_GYXK.shape
    ny, nx = rows.num_tiles, columns.num_tiles
    x = jnp.pad(x_GYXK, ((0, 0), (0, ny * rows.tile - Y), (0, nx * columns.tile - X), (0, 0)))
    x = x.reshape(G, ny, rows.tile, nx, columns.tile, K).swapaxes(2, 3)
    return x.reshape(G, ny * nx, rows.tile * columns.tile, K)


def join_tiles(x_GTQK: jax.Array, height: int, width: int, rows: AxisPlan, columns: AxisPlan) -> jax.Array:
    """Invert `cut_tiles`."""
    G, _, _, K = x_GTQK.shape
    ny, nx = rows.num_tiles, columns.num_tiles
    x = x_GTQK.reshape(G, ny, nx, rows.tile, columns.tile, K).swapaxes(2, 3)
    return x.reshape(G, ny * rows.tile, nx * columns.tile, K)[:, :height, :width]


def tile_mask(rows: AxisPlan, columns: AxisPlan) -> np.ndarray:
    """Return the keys that each query sees, `[tiles, queries, halo keys] bool`."""
    mask = rows.mask[:, None, :, None, :, None] & columns.mask[None, :, None, :, None, :]
    queries, keys = rows.tile * columns.tile, rows.halo * columns.halo
    return mask.reshape(rows.num_tiles * columns.num_tiles, queries, keys)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A map, its window and its tiles; `logits_together` limits the logits computed at once."""

    height: int
    width: int
    kernel_size: int
    scale: float
    tile: tuple[int, int]
    logits_together: int

    @property
    def axes(self) -> tuple[AxisPlan, AxisPlan]:
        """Return the tiles of rows and of columns."""
        sides = zip((self.height, self.width), self.tile, strict=True)
        rows, columns = (plan_axis(side, tile, self.kernel_size) for side, tile in sides)
        return rows, columns

    def attend(self, mask_QM, q_GQK, k_GMK, v_GMK):
        """Attend in one tile of some samples and heads; M counts the keys of its halo."""
        return softmax_attention(q_GQK, k_GMK, v_GMK, mask_QM, self.scale)

    def map_tiles(self, function, mask_TQM, *arrays):
        """Apply function(mask, arrays `[G, ., K]` ...) to the tiles of arrays `[G, T, ., K]`, in chunks."""
        T, num_logits = mask_TQM.shape[0], mask_TQM[0].size
        num_together = max(1, self.logits_together // num_logits)
        if num_together >= T:
            return jax.vmap(function, in_axes=(0, *(1,) * len(arrays)), out_axes=1)(mask_TQM, *arrays)
        tiles = (mask_TQM, *(x.swapaxes(0, 1) for x in arrays))
        results = jax.lax.map(lambda xs: function(*xs), tiles, batch_size=num_together)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), results)

    def map_heads(self, function, *arrays_BNHK):
        """Apply function(`[g, Y, X, K]` ...) -> tuple of that shape to all samples and heads, in chunks."""
        B, N, H, K = arrays_BNHK[0].shape
        split = lambda x: x.swapaxes(1, 2).reshape(B * H, self.height, self.width, K)
        join = lambda x: x.reshape(B, H, N, K).swapaxes(1, 2)
        arrays = tuple(split(x) for x in arrays_BNHK)
        num_keys = self.axes[0].halo * self.axes[1].halo
        num_together = max(1, self.logits_together // (num_keys * N))
        if num_together >= B * H:
            return tuple(join(x) for x in function(*arrays))
        one = lambda xs: tuple(x[0] for x in function(*(x[None] for x in xs)))
        return tuple(join(x) for x in jax.lax.map(one, arrays, batch_size=num_together))

    def forward(self, mask_TQM, q_BNHK, k_BNHK, v_BNHK):
        rows, columns = self.axes

        def attend_some(q, k, v):
            halos = (cut_halos(x, rows, columns) for x in (k, v))
            out = self.map_tiles(self.attend, mask_TQM, cut_tiles(q, rows, columns), *halos)
            return (join_tiles(out, self.height, self.width, rows, columns),)

        return self.map_heads(attend_some, q_BNHK, k_BNHK, v_BNHK)

    def backward(self, mask_TQM, q_BNHK, k_BNHK, v_BNHK, dout_BNHK):
        rows, columns = self.axes
        pull_back_tile = lambda mask, q, k, v, dout: jax.vjp(functools.partial(self.attend, mask), q, k, v)[1](dout)

        def pull_back(q, k, v, dout):
            tiles = [cut_tiles(x, rows, columns) for x in (q, dout)]
            halos, add_halos = jax.vjp(lambda *kv: tuple(cut_halos(x, rows, columns) for x in kv), k, v)
            dq, *dhalos = self.map_tiles(pull_back_tile, mask_TQM, tiles[0], *halos, tiles[1])
            return join_tiles(dq, self.height, self.width, rows, columns), *add_halos(tuple(dhalos))

        return self.map_heads(pull_back, q_BNHK, k_BNHK, v_BNHK, dout_BNHK)


@functools.cache
def operations(tiling: Tiling):
    """Return the forward and backward functions of a tiling, with vmap and sharding rules."""
    mask = (tile_mask(*tiling.axes),)
    return per_device(tiling.forward, ("bnhk",) * 3, ("bnhk",), mask), per_device(
        tiling.backward, ("bnhk",) * 4, ("bnhk",) * 3, mask
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_flat(tiling: Tiling, q_BNHK, k_BNHK, v_BNHK):
    return operations(tiling)[0](q_BNHK, k_BNHK, v_BNHK)[0]


def attend_flat_forward(tiling, q, k, v):
    return attend_flat(tiling, q, k, v), (q, k, v)


def attend_flat_backward(tiling, residuals, dout):
    return operations(tiling)[1](*residuals, dout)


attend_flat.defvjp(attend_flat_forward, attend_flat_backward)


def attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float, tile: tuple[int, int]) -> jax.Array:
    """Compute local-window attention by tiles of `tile` (rows, columns) of queries."""
    B, Y, X, H, K = q_BYXHK.shape
    tiling = Tiling(Y, X, kernel_size, float(scale), tile, LOGITS_TOGETHER[current_platform()])
    flat = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
    return attend_flat(tiling, *flat).reshape(q_BYXHK.shape)


def attend(q_BYXHK: jax.Array, k_BYXHK: jax.Array, v_BYXHK: jax.Array, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by square tiles; see `local_window_attention`."""
    return attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size, scale, TILE)


def attend_bands(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float) -> jax.Array:
    """Compute local-window attention by bands of whole rows; see `local_window_attention`."""
    return attend_tiles(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size, scale, (BAND_ROWS, q_BYXHK.shape[2]))
