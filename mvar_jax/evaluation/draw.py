"""Drawing many samples into a directory, with progress: PNGs, a grid, samples.npz and tokens.npz."""

import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvar_jax.errors import InputError
from mvar_jax.evaluation.pictures import save_png, tile_grid, to_uint8
from mvar_jax.model import Model
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
