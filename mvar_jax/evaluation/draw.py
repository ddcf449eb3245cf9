"""Samples and reconstructions into a directory, with progress: PNGs, grids, samples.npz and tokens.npz."""

import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvar_jax.errors import InputError
from mvar_jax.evaluation.pictures import save_png, side_by_side, tile_grid, to_uint8
from mvar_jax.model import Model
from mvar_jax.ops.statistics import psnr, ssim
from mvar_jax.sampling.sampler import SampleOptions

GRID_IMAGES = 400  # a larger grid is of no use to an eye


def make_directory(path: Path) -> None:
    """Makes a directory that can be written. Raises InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError("out", str(path), f"a directory that can be written ({error.strerror})") from None


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def draw_batches(model: Model, labels_N: np.ndarray, options: SampleOptions, seed: int, batch_size: int):
    """Yields (images uint8 or float [b, Y, X, 3], ids, f_hat) batch by batch; the last is padded, not recompiled."""
    batch_size = min(batch_size, len(labels_N))
    with tqdm(total=len(labels_N), desc="sample", unit="image", mininterval=1) as progress:
        for begin in range(0, len(labels_N), batch_size):
            index = np.arange(begin, begin + batch_size)
            num_real = min(batch_size, len(labels_N) - begin)
            labels = labels_N[np.minimum(index, len(labels_N) - 1)]
            ids, f_hat = model.sample_features(labels, seed, options, index)
            images = model.decode_features(f_hat)
            yield tuple(np.asarray(x)[:num_real] for x in (images, ids, f_hat))
            progress.update(num_real)


def draw_all(
    model: Model,
    labels_N: np.ndarray,
    options: SampleOptions,
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 64,
    columns: int = 8,
    saves_tokens: bool = False,
    truncates: bool = False,
) -> None:
    """Sample number i has label `labels_N[i]` and is a function of (weights, label, seed, i, options)."""
    images, ids, f_hats = [], [], []
    for float_images, batch_ids, f_hat in draw_batches(model, labels_N, options, seed, batch_size):
        batch = to_uint8(float_images, truncates)
        for number, image in enumerate(batch, start=sum(map(len, images))):
            save_png(out / f"{number:06d}.png", image)
        images.append(batch)
        ids.append(batch_ids)
        if saves_tokens:
            f_hats.append(f_hat)
    images_NYX3 = np.concatenate(images)
    if saves_tokens:
        save_npz(out / "tokens.npz", ids=np.concatenate(ids), labels=labels_N, f_hat=np.concatenate(f_hats))
    zoom = max(1, 96 // images_NYX3.shape[1])
    save_png(out / "grid.png", tile_grid(images_NYX3[:GRID_IMAGES], min(columns, 32), zoom=zoom))
    save_npz(out / "samples.npz", arr_0=images_NYX3, arr_1=labels_N)


def reconstruct(model: Model, images_NYX3: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(reconstructions float32 [N, Y, X, 3] in [-1, 1], ids int32 [N, L]), batch by batch at one shape."""
    N, parts = len(images_NYX3), []
    for begin in tqdm(range(0, N, batch_size), desc="reconstruct", unit="batch", mininterval=1):
        rows = np.minimum(np.arange(begin, begin + batch_size), N - 1)
        ids = model.encode(images_NYX3[rows])
        parts.append((np.asarray(model.decode(ids)), np.asarray(ids)))
    images, ids = (np.concatenate(part)[:N] for part in zip(*parts, strict=True))
    return images, ids


def write_reconstructions(model: Model, files: list[Path], load_one, out: Path, batch_size: int, saves_tokens: bool):
    """Writes a side-by-side PNG of each file, reconstructions.png and the table psnr.md, which it returns."""
    images = np.stack([load_one(file) for file in files])
    reconstructions, ids = reconstruct(model, images, min(batch_size, len(files)))
    before, after = to_uint8(images), to_uint8(reconstructions)
    zoom = max(1, 96 // images.shape[1])
    for i, file in enumerate(files):
        # the number keeps photo.png and photo.jpg apart
        save_png(out / f"{i:06d}_{file.stem}.png", side_by_side(before[i : i + 1], after[i : i + 1], 1, zoom=zoom))
    save_png(out / "reconstructions.png", side_by_side(before[:GRID_IMAGES], after[:GRID_IMAGES], 4, zoom=zoom))
    if saves_tokens:
        save_npz(out / "tokens.npz", ids=ids)
    psnr_N, ssim_N = psnr(before, after, 255.0), ssim(before, after, 255.0)
    rows = [(file.name, *scores) for file, *scores in zip(files, psnr_N, ssim_N, strict=True)]
    rows.append(("mean", psnr_N.mean(), ssim_N.mean()))
    table = "| image | PSNR dB | SSIM |\n| --- | --- | --- |\n"
    table += "".join(f"| {name} | {db:.2f} | {similarity:.4f} |\n" for name, db, similarity in rows)
    temporary = out / "psnr.md.tmp"
    temporary.write_text(table)
    os.replace(temporary, out / "psnr.md")
    return table
