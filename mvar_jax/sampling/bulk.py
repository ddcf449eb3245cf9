"""Sampling of any number of images into a directory; resumable, with the same files as an uninterrupted run.

While the next batch is computed, threads write the PNGs of the last ones, and then their arrays to `unfinished/`.
When all batches are complete, their arrays are joined to samples.npz. Process i of n samples batches i, i + n, ...
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mvar_jax.errors import InputError
from mvar_jax.files.directories import remove_tree
from mvar_jax.files.images import GRID_COLUMNS, GRID_IMAGES, min_zoom, save_png, tile_grid
from mvar_jax.files.npz import Pieces, is_whole_npz, save_npz
from mvar_jax.models.init import abstract_params
from mvar_jax.models.networks import Networks
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.progress import Progress
from mvar_jax.sampling.order import Order
from mvar_jax.sampling.sampler import sample
from mvar_jax.sharding import num_shards_of, place, replicated, shardings_of, spec_of, use_mesh

SAMPLES_FILE = "samples.npz"
TOKENS_FILE = "tokens.npz"
UNFINISHED = "unfinished"
NUM_WRITERS = 8


def place_networks(networks: Networks, mesh: Mesh, dtype: str | None = None) -> Networks:
    """Return the networks with their weights on a mesh, all but the tokenizer's sharded by `sharding.RULES`.

    dtype: see `Networks.with_dtype`. Weights may be shapes, see `sharding.place`.
    """
    if networks.later is not None:
        first, later = (place_networks(part, mesh, dtype) for part in networks.parts())
        return first.switched(later, networks.switch)
    networks = networks.with_dtype(dtype)

    def place_params(params, module):
        return None if params is None else place(params, shardings_of(abstract_params(module), mesh))

    return networks.replace(
        tokenizer_params=place(networks.tokenizer_params, replicated(mesh)),
        params=place_params(networks.params, networks.transformer),
        refiner_params=place_params(networks.refiner_params, networks.refiner),
    )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The rows of each batch, and the files of the finished ones."""

    order: Order
    out: Path

    @property
    def size(self) -> int:
        return min(self.order.batch_size, len(self.order.labels_N))

    @property
    def count(self) -> int:
        return -(-len(self.order.labels_N) // self.size)

    def rows(self, batch: int) -> range:
        return range(batch * self.size, min((batch + 1) * self.size, len(self.order.labels_N)))

    def file(self, batch: int) -> Path:
        return self.out / UNFINISHED / f"{batch:07d}.npz"

    def find_finished(self, batches: Iterable[int]) -> set[int]:
        """Return those of the batches whose files are there and undamaged."""
        names = {path.name for path in self.out.iterdir()}
        if UNFINISHED not in names:
            return set()
        arrays = ("pixels", *(("ids", "f_hat") if self.order.saves_tokens else ()))

        def is_finished(batch: int) -> bool:
            has_images = all(f"{number:06d}.png" in names for number in self.rows(batch))
            return has_images and is_whole_npz(self.file(batch), arrays)

        batches = list(batches)
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            return set(itertools.compress(batches, pool.map(is_finished, batches)))

    def are_joined(self) -> bool:
        """Return whether the samples are complete; if what was complete is damaged, it is drawn again."""
        if not (self.out / SAMPLES_FILE).exists():
            return False
        wanted = {SAMPLES_FILE: ("arr_0", "arr_1")}
        if self.order.saves_tokens:
            wanted[TOKENS_FILE] = ("ids", "labels", "f_hat")
        return all(is_whole_npz(self.out / name, arrays, reads_all=False) for name, arrays in wanted.items())

    def write(self, batch: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the PNGs, then the arrays: the arrays' file marks the batch as finished."""
        for number, image in zip(self.rows(batch), arrays["pixels"], strict=True):
            save_png(self.out / f"{number:06d}.png", image)
        save_npz(self.file(batch), **arrays)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yield one array of each batch in order. Raises InputError if a batch is missing."""
        for batch in range(self.count):
            if not self.file(batch).exists():
                message = f"out={self.out} has no batch {batch}: it must be a folder that all processes share"
                raise InputError(message, field="out", given=str(self.out), expected="a folder all processes share")
            with self.file(batch).open("rb") as file, np.load(file) as arrays:
                yield arrays[name]


def draw_all(
    networks: Networks,
    order: Order,
    out: Path,
    mesh: Mesh,
    *,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[], None] = lambda: None,
    check_stop: Callable[[], None] = lambda: None,
) -> bool:
    """Write the files of an order; return False if they are already complete.

    Args:
      networks: weights placed on the mesh, see `place_networks`.
      mesh: of this process's devices alone.
      wait: returns when all processes have called it.
      check_stop: called before each batch; what it raises ends the work once the finished batches are written.

    The folder must be this run's own, see `processes.holding.owned_folder`. Raises InputError if the processes do not
    share it.
    """
    batches = _Batches(order, out)
    is_complete = batches.are_joined()
    wait()  # no process writes before all have looked
    if not is_complete:
        own = range(process_index, batches.count, process_count)
        draw = functools.partial(_draw, networks, batches, mesh=mesh, check_stop=check_stop)
        _write_missing(draw, batches, own, is_shown=process_index == 0)
        wait()
        if process_index == 0:
            _join(batches)
    if process_index == 0:
        remove_tree(out / UNFINISHED)
    wait()
    return not is_complete


def _write_missing(draw: Callable, batches: _Batches, own: range, is_shown: bool) -> None:
    finished = batches.find_finished(own)
    missing = [batch for batch in own if batch not in finished]
    sizes = {batch: len(batches.rows(batch)) for batch in own}
    num_done = sum(sizes.values()) - sum(sizes[batch] for batch in missing)
    writing: collections.deque[Future] = collections.deque()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(NUM_WRITERS))
        shown = Progress("sample", sum(sizes.values()), "image", done=num_done, is_shown=is_shown)
        progress = stack.enter_context(shown)
        for batch, arrays in draw(missing):
            writing.append(pool.submit(batches.write, batch, arrays))
            while len(writing) > 2 * NUM_WRITERS:  # otherwise a slow disk would fill the memory
                writing.popleft().result()
            progress.update(sizes[batch])
        for future in writing:
            future.result()


def _draw(
    networks: Networks, batches: _Batches, missing: list[int], mesh: Mesh, check_stop: Callable[[], None]
) -> Iterator[tuple[int, dict]]:
    """Yield (batch, its arrays) of each missing batch; start the next batch before fetching the last."""
    order, started = batches.order, None
    for batch in [*missing, None]:
        check_stop()
        ready, started = started, None
        if batch is not None:
            started = batch, _start(networks, order, batches.rows(batch), batches.size, mesh)
        if ready is not None:
            number, arrays = ready
            num_real = len(batches.rows(number))
            yield number, {name: np.asarray(x)[:num_real] for name, x in arrays.items()}


def _start(networks: Networks, order: Order, rows: range, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Start computing one batch; all batches have one shape, the last row being repeated to fill the last batch."""
    num_shards = num_shards_of("batch", mesh)
    files = np.minimum(rows.start + np.arange(-(-size // num_shards) * num_shards), rows.stop - 1)
    outputs = ("floor_pixels" if order.truncates else "pixels",)
    outputs += ("ids", "f_hat") if order.saves_tokens else ()
    by_batch = NamedSharding(mesh, spec_of(("batch",)))
    keys = keys_of_samples(order.seed, order.numbers_N[files])
    labels, keys = jax.device_put((order.labels_N[files], keys), by_batch)
    with use_mesh(mesh):
        drawn = sample(networks, labels, keys, order.options, outputs)
    return dict(zip(("pixels", *outputs[1:]), drawn, strict=True))


def sample_reader(networks: Networks, order: Order, mesh: Mesh) -> Callable[[range], np.ndarray]:
    """Return a function that draws the samples of these files of an order, `[n, Y, X, 3] uint8`, and writes nothing.

    They are drawn in the batches of `draw_all`, so that they are the same; the last batch is kept, since those who
    read in order ask for the rest of it next. networks, mesh: as for `draw_all`.
    """
    batches = _Batches(order, Path())

    @functools.lru_cache(maxsize=1)
    def draw(batch: int) -> np.ndarray:
        rows = batches.rows(batch)
        return np.asarray(_start(networks, order, rows, batches.size, mesh)["pixels"])[: len(rows)]

    def read(files: range) -> np.ndarray:
        first, last = files.start // batches.size, (files.stop - 1) // batches.size
        drawn = np.concatenate([draw(batch) for batch in range(first, last + 1)])
        return drawn[files.start - first * batches.size :][: len(files)]

    return read


def _join(batches: _Batches) -> None:
    """Write grid.png, tokens.npz and, last, samples.npz, which marks the samples as complete.

    The grid shows the same number of samples of each label, label by label, so that a row or a block is one label.
    """
    order, labels_N = batches.order, batches.order.labels_N

    def pieces(name: str) -> Pieces:
        first = next(batches.read(name))
        return Pieces((len(labels_N), *first.shape[1:]), first.dtype, batches.read(name))

    num_labels = len(order.labels)
    num_each = max(1, min(order.num, GRID_IMAGES // num_labels))  # files go round-robin over the labels
    if num_labels > 1 and num_each > GRID_COLUMNS:
        num_each -= num_each % GRID_COLUMNS
    num_shown, shown = min(num_each * num_labels, GRID_IMAGES), []
    for part in batches.read("pixels"):
        shown.extend(part[: num_shown - len(shown)])
        if len(shown) == num_shown:
            break
    by_label = np.stack(shown)[np.argsort(order.numbers_N[: len(shown)])]
    # if the labels are too many for a row each, one sample of each fills the rows
    columns = GRID_COLUMNS if num_each == 1 < order.num else min(num_each, GRID_COLUMNS)
    zoom = min_zoom(by_label.shape[1])
    save_png(batches.out / "grid.png", tile_grid(by_label, columns, zoom=zoom))
    if order.saves_tokens:
        save_npz(batches.out / TOKENS_FILE, ids=pieces("ids"), labels=labels_N, f_hat=pieces("f_hat"))
    save_npz(batches.out / SAMPLES_FILE, arr_0=pieces("pixels"), arr_1=labels_N)
