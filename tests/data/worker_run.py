"""A process with two workers that ends in one of several ways: python worker_run.py WAY. Prints the workers' ids."""

import multiprocessing
import os
import sys
import threading
import time

import numpy as np

from mvar_jax.data.workers import run_workers


def items_of(worker, num_workers):
    for number in range(worker, 10**6, num_workers):
        yield {"number": number, "pixels": np.full(2**20, number % 251, np.uint8)}


def images():
    from mvar_jax.data.options import LoadOptions
    from mvar_jax.data.pipeline import train_batches
    from mvar_jax.data.sources import ArraySource

    source = ArraySource(np.zeros((10, 64, 64, 3), np.uint8), np.zeros(10, int), ("a",))
    options = LoadOptions(num_workers=2)
    return train_batches(source, lambda image, rng: image, batch_size=10, seed=0, options=options)


if __name__ == "__main__":
    way = sys.argv[1]
    items = images() if way == "images" else run_workers(items_of, 2)
    first = [next(items) for _ in range(5)]
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if way == "take":
        assert all((next(items)["pixels"] == number % 251).all() for number in range(5, 40))
    elif way == "close":
        items.close()
    elif way == "raise":
        raise SystemExit(3)
    elif way == "os._exit":
        threading.Thread(target=os._exit, args=(5,)).start()
        for _ in items:
            pass
    elif way == "wait":
        time.sleep(600)
