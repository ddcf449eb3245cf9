"""Threads that wait for a store, so that many small requests are under way at once."""

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

NUM_THREADS = 64


class Requests:
    """A pool of threads that does not keep the process from ending, unlike that of `concurrent.futures`.

    If a request fails, all queued requests fail too: the store is gone, and each would retry for minutes.
    """

    def __init__(self, num_threads: int):
        self._waiting: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple]] = queue.SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call a function in one of the threads."""
        future: Future = Future()
        self._waiting.put((future, function, args))
        return future

    def _work(self) -> None:
        while True:
            future, function, args = self._waiting.get()
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
                self._fail_waiting(error)

    def _fail_waiting(self, error: Exception) -> None:
        while True:
            try:
                self._waiting.get_nowait()[0].set_exception(error)
            except queue.Empty:
                return


@functools.cache
def requests() -> Requests:
    """Return the threads of this process."""
    return Requests(NUM_THREADS)
