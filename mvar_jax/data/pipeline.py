"""Batches from a source. A batch is a function of (seed, step) alone, so a run resumes by its step number.

`index` names a row's place in the global stream, `step * batch_size + row`. Sample order and augmentation
depend on it and the seed only, never on threads, on the number of processes or on earlier batches.
"""

import functools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from mvar_jax.data.sources import Source
from mvar_jax.errors import InputError

Transform = Callable[[np.ndarray, np.random.Generator | None], np.ndarray]
Batch = dict[str, np.ndarray]

_FIELD_DTYPES = {"image": np.float32, "ids": np.int32}
_ENDLESS_STEPS = 2**48


def _local_rows(source: Source, batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The contiguous rows of every global batch that belong to this process."""
    if len(source) == 0:
        raise InputError("source", 0, "at least 1 sample")
    if batch_size < 1 or batch_size % process_count:
        raise InputError("batch_size", batch_size, f"a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise InputError("process_index", process_index, f"at least 0 and below {process_count}")
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


def _collate(source: Source, transform: Transform | None, samples: list[int], rngs: list) -> Batch:
    items = [source[sample] for sample in samples]
    field = "ids" if "ids" in items[0] else "image"
    values = [item[field] for item in items]
    if transform is not None:
        values = [transform(value, rng) for value, rng in zip(values, rngs, strict=True)]
    return {
        field: np.stack(values).astype(_FIELD_DTYPES[field], copy=False),
        "label": np.array([item["label"] for item in items], np.int32),
    }


def _prefetch(first: int, stop: int, make_batch: Callable[[int], Batch], num_threads: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(4, 2 * num_threads))
    return iter(grain.MapDataset.range(first, stop).map(make_batch).to_iter_dataset(options))


def train_batches(
    source: Source,
    transform: Transform | None,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches; `start_step=n` is bit for bit a run from step 0 without its first n batches.

    Every epoch is another permutation of the whole source; batches run across epoch boundaries.

    Args:
      transform: maps the item's `image` or `ids` with the sample's own rng; None leaves the item as it is.
      batch_size: rows of the global batch; a process gets `batch_size / process_count` consecutive ones.
      num_threads: threads that prepare batches in the background; 0 prepares them when asked.

    Returns:
      An iterator (closable by `close()`) of dicts: `image` float32 [B, Y, X, 3] in [-1, 1], or `ids` int32
      [B, L] from a token cache; `label` int32 [B]; `index` int64 [B].

    Raises:
      InputError: an empty source, a batch size the processes do not divide, or a number out of range.
    """
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise InputError("seed", seed, "an integer from 0 to 2**32 - 1")
    if start_step < 0:
        raise InputError("start_step", start_step, "at least 0")
    num_samples = len(source)

    # Not grain's shuffle: at 20 us an index it costs more than everything else done to a cached sample.
    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(num_samples)

    def make_batch(step: int) -> Batch:
        index_B = step * batch_size + rows_B
        places = [divmod(index, num_samples) for index in index_B.tolist()]
        samples = [int(epoch_order(epoch)[place]) for epoch, place in places]
        rngs = [None] * len(samples)
        if transform is not None:
            rngs = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in index_B.tolist()]
        return {**_collate(source, transform, samples, rngs), "index": index_B}

    return _prefetch(start_step, _ENDLESS_STEPS, make_batch, num_threads)


def eval_batches(
    source: Source,
    transform: Transform | None,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in order and without randomness (`transform` gets no rng).

    As `train_batches`, plus `mask` float32 [B]: 1 for a sample, 0 for the rows that fill the last batch (they
    repeat the last sample). Every process yields the same number of batches.
    """
    rows_B = _local_rows(source, batch_size, process_index, process_count)
    num_samples = len(source)

    def make_batch(step: int) -> Batch:
        index_B = step * batch_size + rows_B
        samples = np.minimum(index_B, num_samples - 1).tolist()
        batch = _collate(source, transform, samples, [None] * len(samples))
        return {**batch, "index": index_B, "mask": (index_B < num_samples).astype(np.float32)}

    return _prefetch(0, -(-num_samples // batch_size), make_batch, num_threads)
