"""Reconstructions of images: PNGs, a grid, a table of scores, and the arrays. Few images are in memory at a time.

Resumable: the arrays of each finished batch are in `unfinished/` until all batches are joined.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from mvar_jax.api import Model
from mvar_jax.data.decoding import BadImage
from mvar_jax.errors import RunError
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.directories import remove_tree
from mvar_jax.files.images import GRID_IMAGES, Grid, min_zoom, save_png, side_by_side, to_uint8
from mvar_jax.files.npz import is_whole_npz, load_npz, open_npz, save_npz
from mvar_jax.ops.metrics import SSIM_WINDOW, psnr, ssim
from mvar_jax.ops.pixels import from_levels
from mvar_jax.progress import Progress, track

NUM_THREADS = 8  # that decode images, and that write PNGs
NUM_AHEAD = 32  # images decoded before they are needed
MAX_STEM_BYTES = 100  # of an image's name in the name of its PNG
SILENT_S = 10.0  # a check that is quicker shows no progress
TABLE_FILE = "psnr.md"
UNFINISHED = "unfinished"
NO_SSIM = f"no SSIM: its window of {SSIM_WINDOW} x {SSIM_WINDOW} pixels is larger than the images"

Item = TypeVar("Item")
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
      digest: of names and pixels.
    """

    names: list[str]
    load: Load
    bad: dict[str, str]
    digest: str = ""

    @classmethod
    def check(cls, names: list[str], load: Load) -> "Images":
        """Load every image once to find out which can be used."""
        found = track(load_all(names, load), len(names), "check", "image", delay_s=SILENT_S)
        bad, digest = {}, hashlib.sha256()
        for name, loaded in zip(names, found, strict=True):
            if isinstance(loaded, str):
                bad[name] = loaded
            else:
                digest.update(name.encode(errors="surrogateescape") + b"\0" + loaded.tobytes())
        return cls([name for name in names if name not in bad], load, bad, digest.hexdigest()[:16])

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the pixels `[b, Y, X, 3] uint8` of batch_size images at a time."""
        loaded = zip(self.names, load_all(self.names, self.load), strict=True)
        while batch := list(itertools.islice(loaded, batch_size)):
            for name, pixels in batch:
                if isinstance(pixels, str):
                    raise RunError(f"{name} could be read at the start and cannot any more: {pixels}")
            yield np.stack([pixels for _, pixels in batch])


def load_all(items: Sequence[Item], load: Callable[[Item], np.ndarray]) -> Iterator[np.ndarray | str]:
    """Yield the pixels of each item, or the reason why it has none; threads load NUM_AHEAD images ahead."""
    import grain  # slow to import

    def visit(number: int) -> np.ndarray | str:
        try:
            return load(items[number])
        except BadImage as error:
            return str(error)

    options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_AHEAD)
    return iter(grain.MapDataset.range(len(items)).map(visit).to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The files of all images and of the finished batches, each batch known by its first row.

    Attributes:
      names: of the images.
      out: folder of the files.
      size: images in a batch; the last may have fewer.
      shape: height and width of the images.
      channels: of the images.
    """

    names: list[str]
    out: Path
    size: int
    shape: tuple[int, int]
    channels: int

    @property
    def firsts(self) -> range:
        return range(0, len(self.names), self.size)

    @property
    def num_shown(self) -> int:
        return min(len(self.names), GRID_IMAGES)

    def rows(self, first: int) -> range:
        return range(first, min(first + self.size, len(self.names)))

    def png(self, row: int) -> Path:
        stem = Path(readable(self.names[row])).stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
        return self.out / f"{row:06d}_{stem}.png"

    def file(self, first: int) -> Path:
        return self.out / UNFINISHED / f"{first:07d}-{self.rows(first).stop:07d}.npz"

    def find_missing(self) -> list[int]:
        """Return the first rows of the batches whose files are not there or damaged."""
        there = {path.name for path in self.out.iterdir()}
        arrays = ("after", "before", "ids", "scores")

        def is_missing(first: int) -> bool:
            has_images = all(self.png(row).name in there for row in self.rows(first))
            return not (has_images and is_whole_npz(self.file(first), arrays))

        if UNFINISHED not in there:
            return list(self.firsts)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(itertools.compress(self.firsts, pool.map(is_missing, self.firsts)))

    def write(self, first: int, before: np.ndarray, after: np.ndarray, ids: np.ndarray, pool) -> None:
        """Write the PNGs, then the arrays: their file marks the batch as finished. `before` is kept for the grid."""
        scores = list(pool.map(self._write_one, self.rows(first), before, after))
        shown = before[: max(0, self.num_shown - first)]
        save_npz(self.file(first), after=after, before=shown, ids=ids, scores=np.asarray(scores))

    def _write_one(self, row: int, before_YX3: np.ndarray, after_YX3: np.ndarray) -> tuple[float, float]:
        pair = before_YX3[None], after_YX3[None]
        similarity = np.nan if min(self.shape) < SSIM_WINDOW else ssim(*pair, 255.0)[0]
        save_png(self.png(row), side_by_side(*pair, 1, zoom=min_zoom(min(self.shape))))
        return psnr(*pair, 255.0)[0], similarity

    def join(self, num_tokens: int, saves_tokens: bool) -> np.ndarray:
        """Write the arrays and the grid of all batches; return the scores `[N, 2]`."""
        height, width = self.shape
        shown = height, 2 * width, self.channels
        grid, scores = Grid(self.num_shown, 4, shown, zoom=min_zoom(min(self.shape))), []
        arrays = {"reconstructions.npz": ("arr_0", "after", (*self.shape, self.channels), np.uint8)}
        if saves_tokens:
            arrays["tokens.npz"] = ("ids", "ids", (num_tokens,), np.int32)
        with contextlib.ExitStack() as stack:
            appends = {}
            for name, (field, key, shape, dtype) in arrays.items():
                rows = open_npz(self.out / name, field, (len(self.names), *shape), dtype)
                appends[key] = stack.enter_context(rows)
            for first in self.firsts:
                batch = load_npz(self.file(first))
                for key, append in appends.items():
                    append(batch[key])
                scores.append(batch["scores"])
                for number, pair in enumerate(zip(batch["before"], batch["after"], strict=False), first):
                    grid.put(number, np.concatenate(pair, axis=1))
        save_png(self.out / "reconstructions.png", grid.image_YXC)
        return np.concatenate(scores)


def note_exact(num: int) -> str:
    """Return the sentence on images that are equal to their originals."""
    return f"{num} images have no error and are left out of PSNR, which is infinite for them"


def score_table(names: Sequence[str], scores_N2: np.ndarray) -> tuple[str, tuple[str, ...]]:
    """Return (table of PSNR and SSIM of each image and, last, of their means, notes).

    The mean PSNR is of the images that have an error, as in `evaluate --tokenizer`; a score that is not known is "-".
    """
    db_N, similarity_N = scores_N2.T
    has_error_N = np.isfinite(db_N)
    means = db_N[has_error_N].mean() if has_error_N.any() else np.nan, similarity_N.mean()
    table = "| image | PSNR dB | SSIM |\n| --- | --- | --- |\n"
    for name, db, similarity in (*zip(names, db_N, similarity_N, strict=True), ("mean", *means)):
        cells = (format(x, spec) if not np.isnan(x) else "-" for x, spec in ((db, ".2f"), (similarity, ".4f")))
        table += f"| {readable(name)} | {' | '.join(cells)} |\n"
    notes = (note_exact(num),) if (num := int((~has_error_N).sum())) else ()
    return table, notes + ((NO_SSIM,) if np.isnan(means[1]) else ())


def write_reconstructions(
    model: Model, images: Images, out: Path, batch_size: int, saves_tokens: bool
) -> tuple[str, tuple[str, ...]]:
    """Write the reconstructions of images; return the table of their scores and notes. Finished batches are kept.

    A side-by-side PNG of each image, NNNNNN_NAME.png; reconstructions.png, a grid of the first ones;
    reconstructions.npz, whose `arr_0` `[N, Y, X, 3] uint8` has the form of `sample`; and psnr.md, the table and the
    bad images. saves_tokens: also write tokens.npz, ids `[N, L] int32`.
    """
    N = len(images.names)
    batches = _Batches(images.names, out, min(batch_size, N), model.tokenizer.image_shape, model.tokenizer.channels)
    missing = batches.find_missing()
    names = [images.names[row] for first in missing for row in batches.rows(first)]
    shown = Progress("reconstruct", N, "image", done=N - len(names))
    with ThreadPoolExecutor(NUM_THREADS) as pool, shown as progress:
        pixels = dataclasses.replace(images, names=names).batches(batches.size)
        for first, batch in zip(missing, _reconstruct_batches(model, pixels, batches.size), strict=True):
            before, floats, ids = batch
            batches.write(first, before, to_uint8(floats), ids, pool)
            progress.update(len(before))
    scores = batches.join(model.num_tokens, saves_tokens)
    table, notes = score_table(images.names, scores)
    skipped = "".join(f"- {readable(name)}: {reason}\n" for name, reason in images.bad.items())
    text = table + "".join(f"\n{note}\n" for note in notes)
    write_atomically(out / TABLE_FILE, text + (f"\nSkipped:\n\n{skipped}" if skipped else ""))
    remove_tree(out / UNFINISHED)
    return table, notes
