"""Batches from a source. A batch is a function of (seed, step) alone, so a run resumes by its step number.

`index` names a row's place in the global stream, `step * batch_size + row`. Sample order and augmentation
depend on it and the seed only, never on threads, workers, on the number of processes or on earlier batches.
A training row whose image is bad takes the next good one in the epoch's order; an evaluation row gets mask 0.
"""

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator

import grain
import numpy as np

from mvar_jax.data.decoding import BadImage
from mvar_jax.data.skipped import Skipped
from mvar_jax.data.sources import Source
from mvar_jax.errors import InputError

Transform = Callable[[np.ndarray, np.random.Generator | None], np.ndarray]
Batch = dict[str, np.ndarray]
Bad = list[tuple[int, str, str]]  # number, name, reason

_ENDLESS_STEPS = 2**48


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """num_threads: that prepare batches in the background; 0 prepares them when asked. num_workers: processes that
    do it instead, each with so many threads; 0 for none. max_bad_share: of a split's images may be unusable."""

    num_threads: int = 1
    num_workers: int = 0
    max_bad_share: float = 0.01

    def check(self) -> None:
        """Raises InputError for values out of range."""
        for name in ("num_threads", "num_workers"):
            if not 0 <= getattr(self, name) <= 1024:
                raise InputError(f"data.{name}", getattr(self, name), "from 0 to 1024")
        if not 0 <= self.max_bad_share <= 1:
            raise InputError("data.max_bad_share", self.max_bad_share, "a share from 0 to 1")


DEFAULT_LOADING = LoadOptions()


def _local_rows(source: Source, batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The contiguous rows of every global batch that belong to this process."""
    if len(source) == 0:
        raise InputError("source", 0, "at least 1 sample")
    if batch_size < 1 or batch_size % process_count:
        raise InputError("batch_size", batch_size, f"a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise InputError("process_index", process_index, f"at least 0 and below {process_count}")
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


def load(source: Source, transform: Transform | None, number: int, rng=None) -> tuple[str, np.ndarray, int]:
    """(field, value, label) of one item, transformed. Raises BadImage where the item cannot be used."""
    item = source[number]
    field = "ids" if "ids" in item else "image"
    value = item[field] if transform is None else transform(item[field], rng)
    if isinstance(value, bytes):
        raise InputError("transform", None, "one that decodes: the items of this source are files")
    return field, value, item["label"]


def load_good(source: Source, transform: Transform | None, number_of: Callable[[int], int], rng, max_bad: int):
    """(loaded item, bad images before it): the first good one of `number_of(0)`, `number_of(1)`, ...

    As uint8 where the transform can give it: between processes and to a device every byte counts.
    After max_bad + 1 bad ones in a row there is no item, None: the share is surely exceeded.
    """
    bad: Bad = []
    for attempt in range(max_bad + 1):
        number = number_of(attempt)
        try:
            return load(source, getattr(transform, "pixels", transform), number, rng), bad
        except BadImage as error:
            bad.append((number, source.name_of(number), str(error)))
    return None, bad


def _collate(rows: list, bad: Bad) -> tuple[Batch, Bad]:
    if any(row is None for row in rows):
        return {}, bad
    field = rows[0][0]
    batch = {
        field: np.stack([value for _, value, _ in rows]),
        "label": np.array([label for _, _, label in rows], np.int32),
    }
    return batch, bad


def _finish(batch: Batch, transform: Transform | None) -> Batch:
    """The number types of a training step."""
    if "ids" in batch:
        return {**batch, "ids": batch["ids"].astype(np.int32, copy=False)}
    if hasattr(transform, "pixels"):
        return batch
    return {**batch, "image": batch["image"].astype(np.float32, copy=False)}


def _read_ids(source, transform, numbers: np.ndarray, seed: int, index_B: np.ndarray | None) -> Batch:
    """A whole batch of cached ids at once: ten times as quick as row by row, and the same."""
    ids_BvL, label_B = source.read(numbers)
    return {"ids": transform.pick(ids_BvL, seed, index_B), "label": label_B}


def _is_quick(source: Source, transform) -> bool:
    return hasattr(source, "read") and hasattr(transform, "pick")


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    """Ctrl-C reaches every process of the terminal; the one that trains decides what follows from it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prefetch(
    first: int, stop: int, make_batch, transform: Transform | None, skipped: Skipped, options: LoadOptions
) -> Iterator[Batch]:
    """Batches in order. What was bad travels with its batch, so that a worker process can report it."""
    buffer_size = max(4, 2 * options.num_threads) if options.num_threads else 0
    read = grain.ReadOptions(num_threads=options.num_threads, prefetch_buffer_size=buffer_size)
    batches = grain.MapDataset.range(first, stop).map(make_batch).to_iter_dataset(read)
    if options.num_workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # grain reads a flag and fails where nobody has parsed any
        workers = grain.MultiprocessingOptions(num_workers=options.num_workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(workers, worker_init_fn=_ignore_interrupts)
    iterator = iter(batches)
    try:
        for batch, bad in iterator:
            for number, name, reason in bad:
                skipped.add(number, name, reason)
            if not batch:
                raise InputError("bad images", len(skipped), f"a good one among the {skipped.split} images")
            yield _finish(batch, transform)
    finally:
        iterator.close()


# Not grain's shuffle: at 20 us an index it costs more than everything else done to a cached sample.
@functools.lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of all samples that an epoch goes through."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def train_batches(
    source: Source,
    transform: Transform | None,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    options: LoadOptions = DEFAULT_LOADING,
    skipped: Skipped | None = None,
) -> Iterator[Batch]:
    """Endless shuffled batches; `start_step=n` is bit for bit a run from step 0 without its first n batches.

    Every epoch is another permutation of the whole source; batches run across epoch boundaries.

    Args:
      transform: maps the item's `image` or `ids` with the sample's own rng; None leaves the item as it is.
      batch_size: rows of the global batch; a process gets `batch_size / process_count` consecutive ones.
      skipped: takes note of bad images; None: a list of its own by `options.max_bad_share`.

    Returns:
      An iterator (closable by `close()`) of dicts: `image` [B, Y, X, 3], float32 in [-1, 1] or, where
      the transform has `pixels`, uint8 (`ops.pixels.as_images` makes them one); or `ids` int32 [B, L] from a
      token cache; `label` int32 [B]; `index` int64 [B].

    Raises:
      InputError: an empty source, a batch size the processes do not divide, a number out of range; from the
        iterator, too many bad images.
    """
    options.check()
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise InputError("seed", seed, "an integer from 0 to 2**32 - 1")
    if start_step < 0:
        raise InputError("start_step", start_step, "at least 0")
    num_samples = len(source)
    skipped = Skipped("train", num_samples, options.max_bad_share) if skipped is None else skipped
    max_bad, is_quick = skipped.max_bad, _is_quick(source, transform)

    numbers_of = functools.partial(epoch_order, num_samples, seed)

    def load_row(index: int):
        epoch, place = divmod(index, num_samples)
        number_of = lambda attempt: int(numbers_of(epoch)[(place + attempt) % num_samples])
        rng = None if transform is None else np.random.Generator(np.random.Philox(key=[seed, index]))
        return load_good(source, transform, number_of, rng, max_bad)

    def make_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        if is_quick:
            epochs, places = np.divmod(index_B, num_samples)
            parts = [numbers_of(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
            return {**_read_ids(source, transform, np.concatenate(parts), seed, index_B), "index": index_B}, []
        rows = [load_row(index) for index in index_B.tolist()]
        batch, bad = _collate([row for row, _ in rows], [entry for _, found in rows for entry in found])
        return {**batch, "index": index_B} if batch else batch, bad

    return _prefetch(start_step, _ENDLESS_STEPS, make_batch, transform, skipped, options)


def eval_batches(
    source: Source,
    transform: Transform | None,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    options: LoadOptions = DEFAULT_LOADING,
    skipped: Skipped | None = None,
) -> Iterator[Batch]:
    """Every sample once, in order and without randomness (`transform` gets no rng).

    As `train_batches`, plus `mask` float32 [B]: 1 for a sample, 0 for a bad image and for the rows that fill the
    last batch; both repeat another sample. Every process yields the same number of batches.
    """
    options.check()
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    num_samples = len(source)
    skipped = Skipped("val", num_samples, options.max_bad_share) if skipped is None else skipped
    max_bad, is_quick = skipped.max_bad, _is_quick(source, transform)

    def make_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        mask_B = (index_B < num_samples).astype(np.float32)
        numbers = np.minimum(index_B, num_samples - 1)
        if is_quick:
            return {**_read_ids(source, transform, numbers, 0, None), "index": index_B, "mask": mask_B}, []
        rows, bad = [], []
        for row, number in enumerate(numbers.tolist()):
            # where the image is bad another one takes its row, of mask 0: shapes stay
            number_of = lambda attempt, number=number: (number + attempt) % num_samples
            item, found = load_good(source, transform, number_of, None, max_bad)
            mask_B[row] = 0 if found else mask_B[row]
            rows.append(item)
            bad.extend(found)
        batch, bad = _collate(rows, bad)
        return {**batch, "index": index_B, "mask": mask_B} if batch else batch, bad

    return _prefetch(0, -(-num_samples // batch_size), make_batch, transform, skipped, options)
