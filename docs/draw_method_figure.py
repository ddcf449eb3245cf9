"""Draw docs/figures/method.png: the pyramid, the step from one scale to the next, and the window on a fine scale.

Run `python docs/draw_method_figure.py` from anywhere.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

OUT = Path(__file__).parent / "figures" / "method.png"
SIDES = (1, 2, 4, 8, 16)
DRAWN_SIDES = (0.62, 0.95, 1.4, 1.95, 2.6)  # in inches: coarse maps stay visible
GAP = 0.72
WINDOW = 7
QUERIES = ((11, 4), (1, 14))  # (row, column): one inside, one in the corner, where the window is shifted
INK, QUERY, KEYS, FAINT = "#1f2933", "#c2410c", "#fb923c", "#9aa5b1"


def scene(side: int) -> np.ndarray:
    """Return a smooth grey scene in [0, 1], averaged to `side` x `side` cells."""
    grid = (np.arange(64) + 0.5) / 64
    y, x = np.meshgrid(grid, grid, indexing="ij")
    blobs = [(0.38, 0.42, 0.20, 0.95), (0.70, 0.66, 0.15, 0.75), (0.22, 0.78, 0.10, 0.50)]
    image = sum(a * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s * s)) for cy, cx, s, a in blobs)
    return image.reshape(side, 64 // side, side, 64 // side).mean(axis=(1, 3)).clip(0, 1)


def draw_map(axes, left: float, bottom: float, size: float, side: int, is_tinted: bool = True) -> None:
    """Draw a token map as `side` x `side` cells in a square of `size`."""
    cell, values = size / side, scene(side)
    for row in range(side):
        for column in range(side):
            shade = plt.cm.Blues(0.08 + 0.72 * values[row, column]) if is_tinted else "white"
            corner = (left + column * cell, bottom + (side - 1 - row) * cell)
            axes.add_patch(Rectangle(corner, cell, cell, facecolor=shade, edgecolor="#7b8794", linewidth=0.5))
    axes.add_patch(Rectangle((left, bottom), size, size, fill=False, edgecolor=INK, linewidth=1.3))


def draw_pyramid(axes) -> float:
    """Draw the maps with an arrow from each to the next and return the right end."""
    left, middle, spans = 0.1, 2.0, []
    for side, size in zip(SIDES, DRAWN_SIDES, strict=True):
        draw_map(axes, left, middle - size / 2, size, side)
        axes.text(left + size / 2, middle - size / 2 - 0.16, f"{side}×{side}", ha="center", va="top", color=INK)
        spans.append((left, left + size))
        left += size + GAP
    for (_, begin), (end, _) in zip(spans[:-1], spans[1:], strict=True):
        axes.add_patch(
            FancyArrowPatch(
                (begin + 0.06, middle), (end - 0.06, middle), arrowstyle="-|>", mutation_scale=17, color=QUERY, lw=2.2
            )
        )
    fine = spans[-1][0] + 0.5
    for (begin, end), lift, size in zip(spans[:3], (2.2, 1.9, 1.6), DRAWN_SIDES, strict=False):
        start, goal = ((begin + end) / 2, middle + size / 2 + 0.04), (fine, middle + DRAWN_SIDES[-1] / 2 + 0.04)
        corners = [start, (start[0], middle + lift), (goal[0] + 0.4 * (lift - 1.4), middle + lift)]
        corners.append((corners[-1][0], goal[1]))
        axes.plot(*zip(*corners[:3], strict=True), color=FAINT, lw=1.1, ls=(0, (4, 3)))
        axes.annotate(
            "", corners[3], corners[2], arrowprops=dict(arrowstyle="-|>", color=FAINT, lw=1.1, shrinkA=0, shrinkB=0)
        )
    axes.text(3.1, middle + 2.27, "only VAR: every coarser scale", color="#616e7c", fontsize=9, va="bottom")
    axes.text(
        spans[0][0],
        0.12,
        "Scale-Markov: a map is predicted from the scale before it.\n"
        "No token of another scale is a key, so there is no KV cache.",
        color=INK,
        va="top",
    )
    return spans[-1][1]


def draw_window(axes, left: float) -> float:
    """Draw the finest map with two queries and their keys and return the right end."""
    side, size, bottom = SIDES[-1], DRAWN_SIDES[-1], 2.0 - DRAWN_SIDES[-1] / 2
    cell = size / side
    draw_map(axes, left, bottom, size, side, is_tinted=False)
    for row, column in QUERIES:
        top = min(max(row - WINDOW // 2, 0), side - WINDOW)
        first = min(max(column - WINDOW // 2, 0), side - WINDOW)
        corner = (left + first * cell, bottom + (side - top - WINDOW) * cell)
        axes.add_patch(Rectangle(corner, WINDOW * cell, WINDOW * cell, facecolor=KEYS, alpha=0.35, edgecolor="none"))
        axes.add_patch(Rectangle(corner, WINDOW * cell, WINDOW * cell, fill=False, edgecolor=QUERY, linewidth=1.8))
        query = (left + column * cell, bottom + (side - 1 - row) * cell)
        axes.add_patch(Rectangle(query, cell, cell, facecolor=QUERY, edgecolor=INK, linewidth=0.7))
    axes.text(left + size / 2, bottom - 0.16, "16×16, k = 7", ha="center", va="top", color=INK)
    axes.text(
        left - 0.25,
        0.12,
        "Spatial-Markov: a query sees k×k keys of its\nown map; at a border the window is shifted.",
        color=INK,
        va="top",
    )
    return left + size


def main() -> None:
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(12.4, 4.6))
    end = draw_window(axes, draw_pyramid(axes) + 1.0)
    axes.set(xlim=(0, end + 0.6), ylim=(-0.5, 4.6), aspect="equal")
    axes.axis("off")
    figure.savefig(OUT, dpi=110, bbox_inches="tight", pad_inches=0.08, facecolor="white", metadata={"Software": None})
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
