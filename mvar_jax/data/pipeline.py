"""Batches from a source. A batch is a function of (seed, step) alone, so a run resumes by its step number.

`index` is a row's place in the global stream, `step * batch_size + row`. Sample order and augmentation
depend on it and the seed only, never on threads, workers, the number of processes or earlier batches.
If the image of a training row is bad, the row takes the next good one in the epoch's order; an evaluation row
gets mask 0.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from mvar_jax.data.decoding import BadImage
from mvar_jax.data.options import LoadOptions
from mvar_jax.data.protocols import ImageSource, Source, Transform
from mvar_jax.data.skipped import Skipped
from mvar_jax.data.workers import run_workers
from mvar_jax.errors import InputError

Batch = dict[str, np.ndarray]
Bad = list[tuple[int, str, str]]  # number, name, reason

_ENDLESS_STEPS = 2**48
DEFAULT_LOADING = LoadOptions()


def _local_rows(source: Source, batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Return the contiguous rows of every global batch that belong to this process."""
    if len(source) == 0:
        raise InputError("source must hold at least 1 sample, got 0", field="source", given=0, expected="1 or more")
    if batch_size < 1 or batch_size % process_count:
        allowed = f"a positive multiple of the number of processes, {process_count}"
        raise InputError(
            f"batch_size must be {allowed}, got {batch_size}", field="batch_size", given=batch_size, expected=allowed
        )
    if not 0 <= process_index < process_count:
        allowed = f"0 to {process_count - 1}"
        raise InputError(
            f"process_index must be from {allowed}, got {process_index}",
            field="process_index",
            given=process_index,
            expected=allowed,
        )
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


def load(source: ImageSource, transform: Transform, number: int, rng=None) -> tuple[np.ndarray, int]:
    """Return (pixels uint8 [Y, X, 3], label) of one item. Raises BadImage if it cannot be used."""
    item = source[number]
    return transform(item["image"], rng), item["label"]


def is_bad(source: ImageSource, transform: Transform, number: int, name: str) -> bool:
    """Return whether an item is the image of this name and cannot be used."""
    if number >= len(source) or source.name_of(number) != name:
        return False
    try:
        load(source, transform, number)
    except BadImage:
        return True
    return False


def load_good(
    source: ImageSource, transform: Transform, number_of: Callable[[int], int], rng, max_bad: int
) -> tuple[tuple[np.ndarray, int] | None, Bad]:
    """Load the first good one of the items `number_of(0)`, `number_of(1)`, ...

    Returns:
      ((pixels, label), the bad images before it). After max_bad + 1 bad ones in a row the first entry is None: the
      allowed share is then exceeded.
    """
    bad: Bad = []
    for attempt in range(max_bad + 1):
        number = number_of(attempt)
        try:
            return load(source, transform, number, rng), bad
        except BadImage as error:
            bad.append((number, source.name_of(number), str(error)))
    return None, bad


def _collate(rows: list[tuple[np.ndarray, int] | None]) -> Batch:
    """Return the rows as one batch, or an empty one if a row found no good image."""
    if any(row is None for row in rows):
        return {}
    pixels, labels = zip(*rows, strict=True)
    return {"image": np.stack(pixels), "label": np.array(labels, np.int32)}


def _prefetch(first: int, stop: int, make_batch, skipped: Skipped, options: LoadOptions) -> Iterator[Batch]:
    """Yield batches in order. Bad images travel with their batch, so that a worker process can report them."""

    def batches_of(worker: int, num_workers: int) -> Iterator[tuple[Batch, Bad]]:
        import grain  # slow to import

        buffer_size = max(4, 2 * options.num_threads) if options.num_threads else 0
        read = grain.ReadOptions(num_threads=options.num_threads, prefetch_buffer_size=buffer_size)
        steps = grain.MapDataset.range(first + worker, stop, num_workers)
        return iter(steps.map(make_batch).to_iter_dataset(read))

    iterator = run_workers(batches_of, options.num_workers) if options.num_workers else batches_of(0, 1)
    try:
        for batch, bad in iterator:
            for number, name, reason in bad:
                skipped.add(number, name, reason)
            if not batch:
                words = f"no image of the {skipped.split} split can be used; the last is {name}: {reason}"
                raise InputError(words, field="bad images", given=len(skipped), expected="a good one")
            yield batch
    finally:
        iterator.close()


# Not grain's shuffle: at 20 us an index it costs more than everything else done to a cached sample.
@functools.lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of all samples that an epoch goes through."""
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
    """Return endless shuffled batches; `start_step=n` equals a run from step 0 without its first n batches.

    Every epoch is another permutation of the whole source; batches run across epoch boundaries.

    Args:
      source: images or a token cache.
      transform: maps an image to pixels with the sample's own rng. None for a token cache.
      batch_size: rows of the global batch; a process gets `batch_size / process_count` consecutive ones.
      skipped: collects the bad images. If None, a list of its own with `options.max_bad_share`.

    Returns:
      An iterator (closable by `close()`) of dicts: `image` [B, Y, X, 3] uint8 or, from a token cache, `ids` [B, L]
      int32; `label` [B] int32; `index` [B] int64.

    Raises:
      InputError: the source is empty, the processes do not divide the batch size, or a number is out of range. The
        iterator raises it if too many images are bad.
    """
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise InputError(
            f"seed must be from 0 to 2**32 - 1, got {seed}", field="seed", given=seed, expected="0 to 2**32 - 1"
        )
    if start_step < 0:
        raise InputError(
            f"start_step must be 0 or more, got {start_step}",
            field="start_step",
            given=start_step,
            expected="0 or more",
        )
    num_samples = len(source)
    skipped = Skipped("train", num_samples, options.max_bad_share) if skipped is None else skipped
    max_bad, order_of = skipped.max_bad, functools.partial(epoch_order, num_samples, seed)

    def load_row(index: int):
        epoch, place = divmod(index, num_samples)
        number_of = lambda attempt: int(order_of(epoch)[(place + attempt) % num_samples])
        return load_good(
            source, transform, number_of, np.random.Generator(np.random.Philox(key=[seed, index])), max_bad
        )

    def image_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        rows, bad = zip(*map(load_row, index_B.tolist()), strict=True)
        batch = _collate(rows)
        return {**batch, "index": index_B} if batch else batch, sum(bad, [])

    def token_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        epoch_B, place_B = np.divmod(index_B, num_samples)
        numbers = [order_of(epoch)[place_B[epoch_B == epoch]] for epoch in np.unique(epoch_B).tolist()]
        ids_BL, label_B = source.read(np.concatenate(numbers), seed, index_B)
        return {"ids": ids_BL, "label": label_B, "index": index_B}, []

    make_batch = token_batch if source.field == "ids" else image_batch
    return _prefetch(start_step, _ENDLESS_STEPS, make_batch, skipped, options)


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
    """Return every sample once, in order and without randomness: no rng, the first view of a token cache.

    As `train_batches`, plus `mask` [B] float32: 1 for a sample, 0 for a bad image and for the rows that fill the
    last batch; such a row repeats another sample. Every process yields the same number of batches.
    """
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    num_samples = len(source)
    skipped = Skipped("val", num_samples, options.max_bad_share) if skipped is None else skipped
    max_bad = skipped.max_bad

    def load_row(number: int):
        # a bad image's row repeats another one with mask 0: shapes stay
        number_of = lambda attempt: (number + attempt) % num_samples
        return load_good(source, transform, number_of, None, max_bad)

    def image_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        # rows past the end repeat the last sample, or of a process that has none, the last of the split
        last = max((index for index in index_B.tolist() if index < num_samples), default=num_samples - 1)
        loaded = {index: load_row(index) for index in {min(index, last) for index in index_B.tolist()}}
        rows, bad = zip(*(loaded[min(index, last)] for index in index_B.tolist()), strict=True)
        is_good_B = np.array([not found for found in bad])
        batch, mask_B = _collate(rows), (index_B < num_samples) & is_good_B
        return {**batch, "index": index_B, "mask": mask_B.astype(np.float32)} if batch else batch, sum(bad, [])

    def token_batch(step: int) -> tuple[Batch, Bad]:
        index_B = step * batch_size + rows_B
        ids_BL, label_B = source.read(np.minimum(index_B, num_samples - 1), 0, None)
        mask_B = (index_B < num_samples).astype(np.float32)
        return {"ids": ids_BL, "label": label_B, "index": index_B, "mask": mask_B}, []

    make_batch = token_batch if source.field == "ids" else image_batch
    return _prefetch(0, -(-num_samples // batch_size), make_batch, skipped, options)
