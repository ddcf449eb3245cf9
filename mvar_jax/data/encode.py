"""Images to token ids with a tokenizer, and whole data sets to a token cache."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvar_jax.data.pipeline import Transform
from mvar_jax.data.sources import SPLITS, Source
from mvar_jax.data.token_cache import META_NAME, CacheWriter, read_meta
from mvar_jax.errors import InputError
from mvar_jax.model import Model


def view_rng(seed: int, view: int, index: int) -> np.random.Generator | None:
    """View 0 is the image itself; the others are augmented, each by its own numbers."""
    return None if view == 0 else np.random.Generator(np.random.Philox(key=[seed * 2**16 + view, index]))


def encode_split(
    model: Model, source: Source, transform: Transform, num_views: int, seed: int, batch_size: int, name: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids [views, L], label) of every image, in order, with a progress line."""
    pairs = [(index, view) for index in range(len(source)) for view in range(num_views)]
    views: list[np.ndarray] = []
    with tqdm(total=len(pairs), desc=f"encode {name}", unit="view", mininterval=1) as progress:
        for begin in range(0, len(pairs), batch_size):
            chunk = pairs[begin : begin + batch_size]
            images = [transform(source[index]["image"], view_rng(seed, view, index)) for index, view in chunk]
            padded = images + [images[-1]] * (batch_size - len(images))  # one shape, one compilation
            ids = np.asarray(model.encode(np.stack(padded)))[: len(images)]
            for (index, _), ids_L in zip(chunk, ids, strict=True):
                views.append(ids_L)
                if len(views) == num_views:
                    yield np.stack(views), source[index]["label"]
                    views = []
            progress.update(len(chunk))


def write_cache(
    out: str | Path,
    tokenizer_path: str | Path,
    model: Model,
    tokenizer_fingerprint: str,
    sources: dict[str, Source],
    transform: Transform,
    description: dict,
    *,
    num_views: int,
    seed: int,
    batch_size: int = 64,
) -> bool:
    """Writes the cache; False where `out` already holds the same one.

    Training images get `num_views` views, the first without augmentation; validation images one. Raises
    InputError where `out` holds a cache of another tokenizer or of other images.
    """
    out = Path(out)
    descriptions = {
        split: {**description, "num_views": num_views if split == "train" else 1, "seed": seed} for split in SPLITS
    }
    if (out / META_NAME).exists():
        meta = read_meta(out)
        found = {split: entry["transform"] for split, entry in meta["splits"].items()}
        for name, given, there in (
            ("tokenizer", tokenizer_fingerprint, meta["tokenizer_fingerprint"]),
            ("data", descriptions, found),
        ):
            if given != there:
                raise InputError(name, given, f"{there}, that of the cache in {out} (or another --out)")
        return False
    with CacheWriter(
        out,
        sides=model.tokenizer.sides,
        vocab_size=model.tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint,
        tokenizer_path=str(tokenizer_path),
        label_names=sources["train"].label_names,
    ) as writer:
        for split in SPLITS:
            views = descriptions[split]["num_views"]
            records = encode_split(model, sources[split], transform, views, seed, batch_size, split)
            writer.write_split(split, records, num_records=len(sources[split]), transform=descriptions[split])
    return True
