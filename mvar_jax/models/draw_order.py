"""The order in which a refiner draws the tokens of one map, and what each token then sees (docs/method.md, Refiner).

A place is a token's number in raster order; place N, one past the last, stands for "outside the map".
"""

import functools

import numpy as np


def offsets_of_window(window: int) -> tuple[tuple[int, int], ...]:
    """Return (rows up, columns right) of the drawn neighbors in a k x k window, 2 r (r + 1) of them; r = k // 2."""
    r = window // 2
    above = [(a, b) for a in range(1, r + 1) for b in range(-r, r + 1)]
    return (*above, *((0, -b) for b in range(1, r + 1)))


def num_neighbors(window: int | None) -> int:
    """Return the number of drawn tokens that are a token's input."""
    return 1 if window is None else len(offsets_of_window(window))


@functools.lru_cache
def neighbors(side: int, window: int | None) -> np.ndarray:
    """Return the places of each place's drawn neighbors, `[N + 1, O] int32`, N if outside the map.

    Without a window: the predecessor in raster order.
    """
    N = side * side
    if window is None:
        return np.array([N, *range(N - 1), N], np.int32)[:, None]
    rows, columns = np.divmod(np.arange(N), side)
    table = np.full((N + 1, num_neighbors(window)), N, np.int32)
    for column, (up, right) in enumerate(offsets_of_window(window)):
        i, j = rows - up, columns + right
        table[:N, column] = np.where((i >= 0) & (j >= 0) & (j < side), i * side + j, N)
    return table


@functools.lru_cache
def visible(side: int, window: int | None) -> np.ndarray:
    """Return the places that each place attends to, `[N + 1, M] int32`: itself and its drawn neighbors.

    Without a window: itself and all earlier ones.
    """
    N = side * side
    own = np.arange(N + 1, dtype=np.int32)[:, None]
    if window is not None:
        return np.concatenate([own, neighbors(side, window)], axis=1)
    everything = np.broadcast_to(np.arange(N, dtype=np.int32), (N + 1, N))
    return np.where((everything <= own) & (own < N), everything, N)


def visible_mask(side: int, window: int | None) -> np.ndarray:
    """Return the same as a mask, `[N, N] bool`: true if the row's place attends to the column's."""
    table = visible(side, window)[:-1]
    mask = np.zeros((side * side, side * side + 1), bool)
    np.put_along_axis(mask, table, True, axis=1)
    return mask[:, :-1]


@functools.lru_cache
def waves(side: int, window: int | None) -> np.ndarray:
    """Return the places that are drawn at once, `[steps, n] int32`, padded with N.

    Row i, column j belongs to wave j + (r + 1) i: a token's neighbors are in earlier waves. With a window as wide as
    the map, or without one, this is the raster order.
    """
    r = side - 1 if window is None else min(window // 2, side - 1)
    rows, columns = np.divmod(np.arange(side * side), side)
    wave = columns + (r + 1) * rows
    members = [np.flatnonzero(wave == number) for number in range(wave.max() + 1)]
    table = np.full((len(members), max(map(len, members))), side * side, np.int32)
    for row, places in zip(table, members, strict=True):
        row[: len(places)] = places
    return table
