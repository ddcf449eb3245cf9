"""Throughput of the data pipeline: photographs against bare decode-and-crop, cached tokens, record size, start-up.

    python benchmarks/data.py --out out         # a few minutes; prints tables, writes data.json

Photographs are smooth noise as JPEG, 640 x 427 at quality 90, about the size of ImageNet's files. Bare decoding runs
the same transform in a plain loop of one process or of two at once. The rates of a table are measured alternately in
one run, so that other work on the machine affects all of them; the best of the rounds counts.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from mvar_jax.data.folder import FolderSource
from mvar_jax.data.options import LoadOptions
from mvar_jax.data.pipeline import train_batches
from mvar_jax.data.sources import ArraySource
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.scales import KNOWN_SIDES
from mvar_jax.tokens.cache_reader import TokenCache
from mvar_jax.tokens.cache_writer import CacheWriter

NUM_FILES = 192
BATCH = 32
TRANSFORM = PhotoTransform(256, flip=True)
NUM_IMAGENET = 1_281_167


def write_photos(root: Path) -> None:
    """Write NUM_FILES JPEGs to root/train and two to root/val."""
    for split, num in (("train", NUM_FILES), ("val", 2)):
        (root / split / "only").mkdir(parents=True)
        for seed in range(num):
            rng = np.random.default_rng(seed)
            small = rng.integers(0, 256, (60, 90, 3), np.uint8)
            pixels = np.asarray(Image.fromarray(small).resize((640, 427), Image.Resampling.BICUBIC)).astype(int)
            pixels = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / "only" / f"{seed:04d}.jpg", quality=90)


def decode_bare(root: str, num: int, seconds) -> None:
    """Run the transform in a plain loop and put the seconds into the queue."""
    source = FolderSource(root, "train")
    files = [source[i % NUM_FILES]["image"] for i in range(num)]
    TRANSFORM(files[0])
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for data in files:
        TRANSFORM(data, rng)
    seconds.put(time.perf_counter() - began)


def bare_rate(root: Path, num_processes: int, num: int) -> float:
    """Return the images per second of several plain loops at once, each in its own process."""
    context = multiprocessing.get_context("spawn")
    seconds = context.Queue()
    processes = [context.Process(target=decode_bare, args=(str(root), num, seconds)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    total = sum(num / seconds.get(timeout=600) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    return total


def batch_rate(source, transform, num_batches: int, batch_size: int, **options) -> float:
    """Return the images per second of the training pipeline, after its first batches."""
    batches = train_batches(source, transform, batch_size=batch_size, seed=0, options=LoadOptions(**options))
    warm = 1 + 6 * max(1, options.get("num_workers", 0), options.get("num_threads", 1))  # batches in its buffers
    for _ in itertools.islice(batches, warm):
        pass
    began = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    rate = num_batches * batch_size / (time.perf_counter() - began)
    batches.close()
    return rate


def measure_photos(root: Path, rounds: int) -> dict:
    """Return the best rates of bare loops and of the pipeline by threads and by workers, and their median ratios."""
    source = FolderSource(root, "train")
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for count in (1, 2):
            found = {
                f"bare, {count} at once": bare_rate(root, count, 384),
                f"pipeline, {count} threads": batch_rate(source, TRANSFORM, 16 * count, BATCH, num_threads=count),
                f"pipeline, {count} workers": batch_rate(source, TRANSFORM, 16 * count, BATCH, num_workers=count),
            }
            for name, rate in found.items():
                rates.setdefault(name, []).append(rate)
    table = {name: max(values) for name, values in rates.items()}
    for count in (1, 2):
        bare = np.array(rates[f"bare, {count} at once"])
        for kind in (
            "threads",
            "workers",
        ):  # ratios within a round, since the machine's speed may change between rounds
            ratios = np.array(rates[f"pipeline, {count} {kind}"]) / bare
            table[f"pipeline over bare, {count} {kind}"] = float(np.median(ratios))
    return table | {"file bytes": float(np.mean([len(source[i]["image"]) for i in range(NUM_FILES)]))}


def write_tokens(root: Path, num: int) -> None:
    """Write a cache of `num` images, both flips, with uniform ids of 4,096 codes: the worst case for compression."""
    sides = KNOWN_SIDES[256]
    rng = np.random.default_rng(0)

    def read(begin, end, skipped):
        for i in range(begin, end):
            yield rng.integers(0, 4096, (2, sum(side**2 for side in sides))), i % 1000

    names = tuple(map(str, range(1000)))
    about = {"tokenizer_fingerprint": "none", "tokenizer_path": "none", "label_names": names}
    with CacheWriter(root, sides=sides, vocab_size=4096, **about) as writer:
        options = {"num_views": 2, "transform": {}, "num_shards": max(1, num // 8192)}
        writer.write_split("train", read, num_images=num, **options)
        writer.write_split("val", read, num_images=8, num_views=2, transform={})


def measure_tokens(root: Path, rounds: int) -> dict:
    """Return bytes per record and images per second, from memory and from the files."""
    write_tokens(root, 40_000)
    began = time.perf_counter()
    caches = {"files": TokenCache(root, "train", max_memory_bytes=0)}
    opened_s = time.perf_counter() - began
    caches["memory"] = TokenCache(root, "train")
    loaded_s = time.perf_counter() - began - opened_s
    entry = caches["files"].meta["splits"]["train"]
    found = {
        "bytes an image": entry["bytes"] / entry["num_records"],
        "opening 1.28M records, s (scaled up)": opened_s * NUM_IMAGENET / entry["num_records"],
        "reading 1.28M records into memory, s (scaled up)": loaded_s * NUM_IMAGENET / entry["num_records"],
    }
    for name, cache in caches.items():
        rates = [batch_rate(cache, None, 300, 1024, num_threads=2) for _ in range(rounds)]
        found[f"images/s from {name}"] = max(rates)
    return found


def _resident_mib(pid: int) -> float:
    """Return a process's share of the memory in use: a page of n processes counts as 1/n for each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def measure_workers(root: Path) -> dict:
    """Return the memory of this process and four workers that read a cache held in memory, and without the cache."""
    found = {}
    for name, split in (("cache", "train"), ("tiny cache", "val")):
        cache = TokenCache(root, split)
        batches = train_batches(cache, None, batch_size=256, seed=0, options=LoadOptions(num_workers=4))
        for _ in itertools.islice(batches, 64):
            pass
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        found[f"parent and 4 workers, {name}, MiB"] = sum(map(_resident_mib, processes))
        found[f"bytes of the {name} file, MiB"] = cache.meta["splits"][split]["bytes"] / 2**20
        batches.close()
        del cache, batches
    return found


class _Imagenet(ArraySource):
    """A source of as many records as ImageNet, made on access."""

    def __getitem__(self, index):
        return {"image": np.zeros((8, 8, 3), np.uint8), "label": int(self._labels[index])}


def measure_start(root: Path) -> dict:
    """Return the seconds to the first batch of 1.28 million records, and to list as many files."""
    labels = np.arange(NUM_IMAGENET) % 1000
    source = _Imagenet(labels, labels, tuple(map(str, range(1000))))
    began = time.perf_counter()
    batches = train_batches(source, PhotoTransform(8, flip=True), batch_size=256, seed=0)
    next(batches)
    index_s = time.perf_counter() - began
    batches.close()
    num_classes, per_class = 20, NUM_IMAGENET // 1000
    for split in ("train", "val"):
        for k in range(num_classes):
            folder = root / split / f"n{k:08d}"
            folder.mkdir(parents=True)
            for i in range(per_class if split == "train" else 1):
                (folder / f"n{k:08d}_{i}.JPEG").touch()
    began = time.perf_counter()
    size = len(FolderSource(root, "train"))
    listed_s = (time.perf_counter() - began) * NUM_IMAGENET / size
    return {"first batch of 1.28M records, s": index_s, "listing 1.28M files, s (scaled up)": listed_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_photos(scratch / "photos")
        found = {
            "photographs, images/s": measure_photos(scratch / "photos", args.rounds),
            "tokens": measure_tokens(scratch / "tokens", args.rounds),
            "workers": measure_workers(scratch / "tokens"),
            "start": measure_start(scratch / "names"),
        }
    (out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    for title, table in found.items():
        print(f"\n| {title} | |\n| --- | --- |")
        print("\n".join(f"| {name} | {value:,.2f} |" for name, value in table.items()))


if __name__ == "__main__":
    main()
