"""Encoding images to token ids, and whole data sets to a token cache."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mvar_jax.checkpoints.model_directory import fingerprint, ids_fingerprint, save_model
from mvar_jax.data.decoding import BadImage
from mvar_jax.data.options import LoadOptions
from mvar_jax.data.pipeline import DEFAULT_LOADING
from mvar_jax.data.protocols import ImageSource, Transform
from mvar_jax.data.skipped import Skipped
from mvar_jax.files.paths import as_path
from mvar_jax.models.networks import Networks
from mvar_jax.ops.pixels import as_images
from mvar_jax.progress import Progress
from mvar_jax.sharding import make_mesh, put_batch, replicated
from mvar_jax.tokens.cache_reader import META_NAME, find_missing
from mvar_jax.tokens.cache_writer import CacheWriter
from mvar_jax.tokens.same import check_same_cache

IMAGES_PER_SHARD = 8192  # an interruption loses at most so much work


def view_rng(seed: int, view: int, index: int) -> np.random.Generator:
    """Return the generator of one view of one image."""
    return np.random.Generator(np.random.Philox(key=[seed * 2**16 + view, index]))


@jax.jit
def encode_pixels(networks: Networks, pixels_BYX3: jax.Array) -> jax.Array:
    """Return the token ids [B, L] int32 of pixels [B, Y, X, 3] uint8."""
    return networks.apply_tokenizer(as_images(pixels_BYX3), method="encode")


class Encoder:
    """From pixels, uint8 [Y, X, 3] each, to ids [B, L] int32, on all devices of this process.

    Args:
      networks: the tokenizer and its weights.
      batch_size: images at a time, rounded up to a multiple of the number of devices.
    """

    def __init__(self, networks: Networks, batch_size: int):
        devices = jax.local_devices()
        self._mesh = make_mesh(devices=devices)
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        params = jax.device_put(networks.tokenizer_params, replicated(self._mesh))
        self._networks = Networks(networks.tokenizer, params)

    def __call__(self, pixels: list[np.ndarray]) -> jax.Array:
        """Return ids [batch_size, L] without waiting for the device. A short batch is padded to one shape."""
        padded = pixels + [pixels[-1]] * (self.batch_size - len(pixels))
        return encode_pixels(self._networks, put_batch({"image": np.stack(padded)}, self._mesh)["image"])


def _load_views(source: ImageSource, transform: Transform, num_views: int, seed: int, number: int):
    """Return (views, label) of an image, or the reason why it is bad."""
    try:
        item = source[number]
        views = [transform.view(item["image"], view, view_rng(seed, view, number)) for view in range(num_views)]
    except BadImage as error:
        return str(error)
    return views, item["label"]


def _ids_of(encoder: Encoder, views: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the ids [L] of every view in order; one batch is on the device while the next is loaded."""
    waiting: jax.Array | None = None
    batch: list[np.ndarray] = []
    for view in views:
        batch.append(view)
        if len(batch) == encoder.batch_size:
            ready, waiting, batch = waiting, encoder(batch), []
            yield from () if ready is None else np.asarray(ready)
    yield from () if waiting is None else np.asarray(waiting)
    yield from np.asarray(encoder(batch))[: len(batch)] if batch else ()


def encode_range(
    encoder: Encoder,
    source: ImageSource,
    transform: Transform,
    begin: int,
    end: int,
    *,
    num_views: int,
    seed: int,
    num_threads: int,
    skip: Callable[[int, str], None],
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (ids [views, L], label) of every good image from `begin` to `end`, in order.

    Args:
      skip: called with the number of a bad image and the reason.
    """
    import grain  # slow to import

    load = partial(_load_views, source, transform, num_views, seed)
    # a batch waits while the one before is encoded, and each thread prepares an image
    num_waiting = -(-encoder.batch_size // num_views) + num_threads
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_waiting)
    loaded = iter(grain.MapDataset.range(begin, end).map(load).to_iter_dataset(options))
    labels: list[int] = []

    def views() -> Iterator[np.ndarray]:
        for number, item in enumerate(loaded, begin):
            if isinstance(item, str):
                skip(number, item)
                continue
            labels.append(item[1])
            yield from item[0]

    try:
        pyramids: list[np.ndarray] = []
        for ids_L in _ids_of(encoder, views()):
            pyramids.append(ids_L)
            if len(pyramids) == num_views:
                yield np.stack(pyramids), labels.pop(0)
                pyramids = []
    finally:
        loaded.close()


def _write_split(
    writer: CacheWriter, encoder: Encoder, source: ImageSource, transform: Transform, skipped: Skipped, **options
):
    """Write one split; options: num_views, seed, description, images_per_shard, num_threads, check_stop."""
    split, num_views, seed = skipped.split, options["num_views"], options["seed"]
    with Progress(f"encode {split}", len(source), "image") as progress:

        def read_records(begin: int, end: int, bad: list):
            def skip(number: int, reason: str) -> None:
                name = source.name_of(number)
                bad.append({"number": number, "name": name, "reason": reason})
                skipped.add(number, name, reason)
                progress.update()

            progress.skip_to(begin)  # shards of an earlier run
            numbers = {"num_views": num_views, "seed": seed, "num_threads": options["num_threads"]}
            for record in encode_range(encoder, source, transform, begin, end, skip=skip, **numbers):
                yield record
                progress.update()
                options["check_stop"]()

        writer.write_split(
            split,
            read_records,
            num_images=len(source),
            num_views=num_views,
            transform=options["description"],
            num_shards=-(-len(source) // options["images_per_shard"]),
            files_of=lambda begin, end: source.files_digest(np.arange(begin, end), with_sizes=True),
        )
        for entry in writer.skipped()[split]:  # those of an earlier run too
            skipped.add(**entry)


def write_cache(
    out: str | Path,
    tokenizer_path: str | Path,
    networks: Networks,
    sources: dict[str, ImageSource],
    transform: Transform,
    description: dict,
    *,
    num_views: int,
    seed: int,
    batch_size: int = 64,
    images_per_shard: int = IMAGES_PER_SHARD,
    loading: LoadOptions = DEFAULT_LOADING,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[], None] = lambda: None,
    check_stop: Callable[[], None] = lambda: None,
) -> bool:
    """Write a token cache. Resumable: after an interruption it continues with the first unfinished shard.

    A finished cache that lacks a file is written again.

    Args:
      out: directory of the cache, on this machine or in an object store.
      tokenizer_path: where the tokenizer was loaded from; stored with the cache.
      networks: the tokenizer and its weights, which are written into the cache.
      sources: image source of each split; there may be no "val".
      transform: makes the views of an image.
      description: what decides on the pixels; stored with the cache.
      num_views: views of each training image; a validation image has the first alone.
      seed: of the augmentation of views.
      process_index, process_count, wait: see `CacheWriter`.
      check_stop: called after each image; what it raises ends the work, and the finished shards stay.

    Returns:
      False if `out` already holds the same cache.

    Raises:
      InputError: `out` holds a cache of another tokenizer or of other images, finished or not, or too many images
        are bad.
    """
    transform.check_views(num_views)
    out, views = as_path(out, "out"), {"train": num_views, "val": 1}
    descriptions = {split: {**description, "num_views": views[split], "seed": seed} for split in sources}
    if (out / META_NAME).exists():
        check_same_cache(out, networks, descriptions, sources)
        if not (missing := find_missing(out)):
            return False
        if process_index == 0:
            print(f"{out} is written again: {missing} is missing or was cut", file=sys.stderr, flush=True)
    num_all = sum(len(source) * views[split] for split, source in sources.items())
    encoder = Encoder(networks, min(batch_size, max(1, num_all)))
    with CacheWriter(
        out,
        sides=networks.tokenizer.sides,
        vocab_size=networks.tokenizer.vocab_size,
        tokenizer_fingerprint=fingerprint(networks.tokenizer, networks.tokenizer_params),
        tokenizer_ids=ids_fingerprint(networks.tokenizer, networks.tokenizer_params),
        tokenizer_path=str(tokenizer_path),
        label_names=sources["train"].label_names,
        save_tokenizer=partial(_save_tokenizer, networks),
        process_index=process_index,
        process_count=process_count,
        wait=wait,
    ) as writer:
        for split, source in sources.items():
            _write_split(
                writer,
                encoder,
                source,
                transform,
                Skipped(split, len(source), loading.max_bad_share),
                num_views=views[split],
                seed=seed,
                description=descriptions[split],
                images_per_shard=images_per_shard,
                num_threads=max(1, loading.num_threads),
                check_stop=check_stop,
            )
    return True


def _save_tokenizer(networks: Networks, folder: Path) -> None:
    save_model(folder, {"tokenizer": networks.tokenizer}, {"tokenizer": networks.tokenizer_params})
