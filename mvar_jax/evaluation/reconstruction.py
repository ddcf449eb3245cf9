"""Reconstructions of images: PNGs, a grid, a table of scores and tokens.npz."""

from pathlib import Path

import numpy as np

from mvar_jax.api import Model
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.images import GRID_IMAGES, min_zoom, save_png, side_by_side, to_uint8
from mvar_jax.files.npz import save_npz
from mvar_jax.ops.metrics import psnr, ssim
from mvar_jax.ops.pixels import from_levels
from mvar_jax.progress import track


def reconstruct(model: Model, pixels_NYX3: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode and decode pixels `[N, Y, X, 3] uint8` in batches of one shape.

    Returns (reconstructions `[N, Y, X, 3] float32` in [-1, 1], ids `[N, L] int32`).
    """
    N, parts = len(pixels_NYX3), []
    for begin in track(range(0, N, batch_size), -(-N // batch_size), "reconstruct", "batch"):
        rows = np.minimum(np.arange(begin, begin + batch_size), N - 1)
        ids = model.encode(from_levels(pixels_NYX3[rows]))
        parts.append((np.asarray(model.decode(ids)), np.asarray(ids)))
    images, ids = (np.concatenate(part)[:N] for part in zip(*parts, strict=True))
    return images, ids


def write_reconstructions(model: Model, files: list[Path], load_one, out: Path, batch_size: int, saves_tokens: bool):
    """Write a side-by-side PNG of each file, reconstructions.png and the table psnr.md; return the table.

    Args:
      load_one: path -> pixels `[Y, X, 3] uint8`.
      saves_tokens: also write tokens.npz, ids `[N, L] int32`.
    """
    before = np.stack([load_one(file) for file in files])
    reconstructions, ids = reconstruct(model, before, min(batch_size, len(files)))
    after, zoom = to_uint8(reconstructions), min_zoom(before.shape[1])
    for i, file in enumerate(files):
        # numbered, so that photo.png and photo.jpg get different names
        save_png(out / f"{i:06d}_{file.stem}.png", side_by_side(before[i : i + 1], after[i : i + 1], 1, zoom=zoom))
    save_png(out / "reconstructions.png", side_by_side(before[:GRID_IMAGES], after[:GRID_IMAGES], 4, zoom=zoom))
    if saves_tokens:
        save_npz(out / "tokens.npz", ids=ids)
    psnr_N, ssim_N = psnr(before, after, 255.0), ssim(before, after, 255.0)
    rows = [(file.name, *scores) for file, *scores in zip(files, psnr_N, ssim_N, strict=True)]
    rows.append(("mean", psnr_N.mean(), ssim_N.mean()))
    table = "| image | PSNR dB | SSIM |\n| --- | --- | --- |\n"
    table += "".join(f"| {name} | {db:.2f} | {similarity:.4f} |\n" for name, db, similarity in rows)
    write_atomically(out / "psnr.md", table)
    return table
