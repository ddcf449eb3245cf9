"""How fast a run goes: images per second, share of the peak FLOP/s, time spent waiting for batches."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Throughput:
    """Rates of training alone: evaluations, pictures and saves are not counted.

    peak_flops: FLOP/s of all devices together. If None, `mfu` is not reported.
    """

    def __init__(self, examples_per_step: int, peak_flops: float | None = None):
        self._examples_per_step, self._peak_flops = examples_per_step, peak_flops
        self._num_windows, self._has_warned, self._is_paused = 0, False, False
        self._start(time.perf_counter())

    def _start(self, now_s: float) -> None:
        self._num_steps, self._flops, self._waited_s, self._since_s = 0, 0.0, 0.0, now_s

    def count_step(self, flops: float = 0.0) -> None:
        """Count a step. flops: the model's in this step, forward and backward, without recomputation."""
        self._num_steps += 1
        self._flops += flops

    @contextmanager
    def pause(self):
        """Leave out the time spent inside; a pause within a pause counts once."""
        if self._is_paused:
            yield
            return
        before_s, self._is_paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._since_s += time.perf_counter() - before_s
            self._is_paused = False

    def wait_for(self, batches: Iterator) -> Any:
        """Return the next batch and add up the time waited for it."""
        before_s = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - before_s
        return batch

    def take(self) -> dict[str, float]:
        """Return `images_per_s` and, if the peak is known, `mfu` since the last call."""
        now_s = time.perf_counter()
        seconds = max(now_s - self._since_s, 1e-9)
        rates = {"images_per_s": self._num_steps * self._examples_per_step / seconds}
        if self._peak_flops and self._flops:
            rates["mfu"] = self._flops / seconds / self._peak_flops
        # the first window holds compilation and the filling of the pipeline
        if self._num_windows and not self._has_warned and self._waited_s > seconds / 2 and self._num_steps > 1:
            self._warn(self._waited_s / seconds)
        self._num_windows += 1
        self._start(now_s)
        return rates

    def _warn(self, share: float) -> None:
        self._has_warned = True
        if jax.process_index() == 0:
            print(
                f"warning: {100 * share:.0f}% of the time is spent waiting for batches: reading or augmenting the "
                "data limits this run (a token cache, faster storage or more CPU cores would help)",
                file=sys.stderr,
                flush=True,
            )
