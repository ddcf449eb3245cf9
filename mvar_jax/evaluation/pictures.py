"""Pictures for people: image grids, originals beside reconstructions, training curves. Written atomically."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.ops.pixels import to_levels


def to_uint8(images_BYX3, truncate: bool = False) -> np.ndarray:
    """Images in [-1, 1] as uint8 on the host; see `to_levels`."""
    return to_levels(np.asarray(images_BYX3, np.float32), truncate)


def tile_grid(images_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """One uint8 picture [rows, columns, 3] of uint8 images, row by row, on white.

    `pad` white pixels separate the images and frame the picture; `zoom` repeats every pixel of an image
    `zoom` times each way, so that tiny images can be seen. Raises InputError for anything but uint8 RGB.
    """
    images_BYX3 = np.asarray(images_BYX3)
    if images_BYX3.dtype != np.uint8 or images_BYX3.ndim != 4 or images_BYX3.shape[3] != 3:
        raise InputError("images", f"{images_BYX3.dtype} {images_BYX3.shape}", "uint8 [B, Y, X, 3]")
    if len(images_BYX3) == 0 or min(columns, zoom) < 1:
        given = f"{len(images_BYX3)} images, columns={columns}, zoom={zoom}"
        raise InputError("grid", given, "at least 1 of each")
    images_BYX3 = images_BYX3.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = images_BYX3.shape[1:3]
    columns = min(columns, len(images_BYX3))
    rows = math.ceil(len(images_BYX3) / columns)
    grid = np.full((pad + rows * (height + pad), pad + columns * (width + pad), 3), 255, np.uint8)
    for i, image_YX3 in enumerate(images_BYX3):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = image_YX3
    return grid


def side_by_side(originals_BYX3, reconstructions_BYX3, columns: int, pad: int = 2, zoom: int = 1) -> np.ndarray:
    """A grid of `columns` pairs a row, each an original and, touching its right edge, its reconstruction."""
    originals_BYX3, reconstructions_BYX3 = np.asarray(originals_BYX3), np.asarray(reconstructions_BYX3)
    if originals_BYX3.shape != reconstructions_BYX3.shape:
        raise InputError("reconstructions", reconstructions_BYX3.shape, f"shape {originals_BYX3.shape}")
    return tile_grid(np.concatenate([originals_BYX3, reconstructions_BYX3], axis=2), columns, pad, zoom)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`: takes its place when the block ends well, is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_png(path: str | os.PathLike, image_YX3: np.ndarray) -> None:
    """Writes a uint8 RGB picture; folders are made, and a reader never sees half a file."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image_YX3).save(temporary, format="PNG")


Curve = tuple[Sequence[float], Sequence]  # steps [K], values [K] or [K, number of lines]


@dataclass(frozen=True)
class Curves:
    """What `plot_curves` draws; every curve is (steps, values) at its own steps."""

    validation_loss: Curve  # values [K, S], nats a token
    training_loss: Curve
    tokenizer_psnr_db: Curve  # held-out images
    tokenizer_usage_percent: Curve  # values [K] or, one line a scale, [K, S]
    patch_nums: tuple[int, ...]
    num_codes: int


def plot_curves(path: str | os.PathLike, series: Curves) -> None:
    """A PNG of three panels: validation loss per scale (dotted: log V, guessing), training, tokenizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    validation, training, tokenizer = figure.subplots(1, 3)

    steps, loss_KS = series.validation_loss
    for side, loss_K in zip(series.patch_nums, np.asarray(loss_KS, np.float64).T, strict=True):
        validation.plot(steps, loss_K, marker=".", label=f"{side} x {side}")
    validation.axhline(math.log(series.num_codes), linestyle=":", color="black", label="log V")
    validation.set(title="validation loss per scale", xlabel="step", ylabel="nats per token", ylim=(0, None))
    validation.legend()

    training.plot(*series.training_loss)
    training.set(title="training loss", xlabel="step", ylabel="nats per token")

    tokenizer.plot(*series.tokenizer_psnr_db, color="tab:blue", marker=".")
    tokenizer.set(title="tokenizer", xlabel="step")
    tokenizer.set_ylabel("held-out PSNR, dB", color="tab:blue")
    usage = tokenizer.twinx()
    usage.plot(*series.tokenizer_usage_percent, color="tab:orange")
    usage.set_ylim(0, 102)
    usage.set_ylabel("codebook usage, %", color="tab:orange")

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
