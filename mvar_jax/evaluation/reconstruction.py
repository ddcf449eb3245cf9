"""Reconstructions of images: PNGs, a grid, a table of scores, and the arrays. Few images are in memory at a time."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mvar_jax.api import Model
from mvar_jax.data.decoding import BadImage
from mvar_jax.errors import RunError
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.images import GRID_IMAGES, Grid, min_zoom, save_png, side_by_side, to_uint8
from mvar_jax.files.npz import open_npz
from mvar_jax.ops.metrics import psnr, ssim
from mvar_jax.ops.pixels import from_levels
from mvar_jax.progress import Progress, track

NUM_THREADS = 8  # that decode images, and that write PNGs
NUM_AHEAD = 32  # images decoded before they are needed
MAX_STEM_BYTES = 100  # of an image's name in the name of its PNG
SILENT_S = 10.0  # a check that is quicker shows no progress
TABLE_FILE = "psnr.md"

Load = Callable[[str], np.ndarray]  # name -> pixels [Y, X, 3] uint8; raises BadImage


def reconstruct(model: Model, pixels_NYX3: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode and decode pixels `[N, Y, X, 3] uint8` in batches of one shape.

    Returns (reconstructions `[N, Y, X, 3] float32` in [-1, 1], ids `[N, L] int32`).
    """
    begins = range(0, len(pixels_NYX3), batch_size)
    batches = (pixels_NYX3[begin : begin + batch_size] for begin in begins)
    parts = list(track(_reconstruct_batches(model, batches, batch_size), len(begins), "reconstruct", "batch"))
    images, ids = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    return images, ids


def _reconstruct_batches(model: Model, batches: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple]:
    """Yield (pixels, reconstructions, ids) of each batch; a smaller one is padded with its last image meanwhile."""
    for pixels in batches:
        rows = np.minimum(np.arange(batch_size), len(pixels) - 1)
        ids = model.encode(from_levels(pixels[rows]))
        yield pixels, np.asarray(model.decode(ids))[: len(pixels)], np.asarray(ids)[: len(pixels)]


def readable(name: str) -> str:
    """Return a file's name as UTF-8 text; bytes that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Images:
    """Images by name.

    Attributes:
      names: of the images that can be used, in order.
      load: called from several threads.
      bad: the reason of each that cannot be used, by name.
    """

    names: list[str]
    load: Load
    bad: dict[str, str]

    @classmethod
    def check(cls, names: list[str], load: Load) -> "Images":
        """Load every image once to find out which can be used."""
        found = track(_load_all(names, load), len(names), "check", "image", delay_s=SILENT_S)
        bad = {name: loaded for name, loaded in zip(names, found, strict=True) if isinstance(loaded, str)}
        return cls([name for name in names if name not in bad], load, bad)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the pixels `[b, Y, X, 3] uint8` of batch_size images at a time."""
        loaded = zip(self.names, _load_all(self.names, self.load), strict=True)
        while batch := list(itertools.islice(loaded, batch_size)):
            for name, pixels in batch:
                if isinstance(pixels, str):
                    raise RunError(f"{name} could be read at the start and cannot any more: {pixels}")
            yield np.stack([pixels for _, pixels in batch])


def _load_all(names: list[str], load: Load) -> Iterator[np.ndarray | str]:
    """Yield the pixels of each image, or the reason why it has none; threads load NUM_AHEAD images ahead."""
    import grain  # slow to import

    def visit(number: int) -> np.ndarray | str:
        try:
            return load(names[number])
        except BadImage as error:
            return str(error)

    options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_AHEAD)
    return iter(grain.MapDataset.range(len(names)).map(visit).to_iter_dataset(options))


def write_reconstructions(model: Model, images: Images, out: Path, batch_size: int, saves_tokens: bool) -> str:
    """Write the reconstructions of images and return the table of their scores.

    A side-by-side PNG of each image, NNNNNN_NAME.png; reconstructions.png, a grid of the first ones;
    reconstructions.npz, whose `arr_0` `[N, Y, X, 3] uint8` has the form of `sample`; and psnr.md, the table and the
    bad images. saves_tokens: also write tokens.npz, ids `[N, L] int32`.
    """
    N, side, scores = len(images.names), model.tokenizer.image_size, []
    batch_size, zoom, numbers = min(batch_size, N), min_zoom(side), itertools.count()
    num_shown = min(N, GRID_IMAGES)
    grid = Grid(num_shown, 4, side, 2 * side, zoom=zoom)

    def write_one(number: int, before_YX3: np.ndarray, after_YX3: np.ndarray) -> tuple[float, float]:
        pair = before_YX3[None], after_YX3[None]
        similarity = ssim(*pair, 255.0)[0]  # before anything is written: it refuses images that are too small
        stem = Path(readable(images.names[number])).stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
        save_png(out / f"{number:06d}_{stem}.png", side_by_side(*pair, 1, zoom=zoom))
        if number < num_shown:
            grid.put(number, np.concatenate([before_YX3, after_YX3], axis=1))
        return psnr(*pair, 255.0)[0], similarity

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(NUM_THREADS))
        progress = stack.enter_context(Progress("reconstruct", N, "image"))
        open_rows = lambda *array: stack.enter_context(open_npz(*array))
        appends = [open_rows(out / "reconstructions.npz", "arr_0", (N, side, side, 3), np.uint8)]
        if saves_tokens:
            appends.append(open_rows(out / "tokens.npz", "ids", (N, model.num_tokens), np.int32))
        for before, floats, ids in _reconstruct_batches(model, images.batches(batch_size), batch_size):
            after = to_uint8(floats)
            scores += pool.map(write_one, itertools.islice(numbers, len(after)), before, after)
            for append, rows in zip(appends, (after, ids), strict=False):
                append(rows)
            progress.update(len(after))
    save_png(out / "reconstructions.png", grid.image_YX3)
    rows = [(name, *score) for name, score in zip(images.names, scores, strict=True)]
    table = "| image | PSNR dB | SSIM |\n| --- | --- | --- |\n"
    for name, db, similarity in (*rows, ("mean", *np.mean(scores, axis=0))):
        table += f"| {readable(name)} | {db:.2f} | {similarity:.4f} |\n"
    skipped = "".join(f"- {readable(name)}: {reason}\n" for name, reason in images.bad.items())
    write_atomically(out / TABLE_FILE, table + (f"\nSkipped:\n\n{skipped}" if skipped else ""))
    return table
