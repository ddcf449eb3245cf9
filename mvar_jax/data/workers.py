"""Worker processes that prepare items in turn. They end with the process that started them, however it ends."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from mvar_jax.data.pillow_warnings import ignore_pillow_warnings
from mvar_jax.data.shared_memory import Message, receive
from mvar_jax.errors import RunError

_ITEMS_AHEAD = 2  # of each worker, packed and not yet taken
# The process that trains decides what follows from these, which reach every process of a terminal or a Slurm step.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def run_workers(items_of: Callable[[int, int], Iterator[Any]], num_workers: int) -> Iterator[Any]:
    """Yield item i from worker `i % num_workers`; its arrays are not copied.

    Args:
      items_of: (worker, num_workers) -> the items of one worker, called in its process. It may be a closure.

    Raises:
      RunError: a worker was killed.
      Exception: what `items_of` or its items raise in a worker.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # it would unblock the signals if it were started with the first worker
    workers: list[tuple[Any, socket.socket]] = []

    def end_all() -> None:
        while workers:
            process, channel = workers.pop()
            process.kill()  # they hold nothing that could be left half done
            process.join()
            channel.close()

    atexit.register(end_all)  # if the iterator is never closed; runs before multiprocessing waits for its processes
    try:
        work = Message(items_of)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited: there is no moment without it
        try:
            for worker in range(num_workers):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = context.Process(target=_work, args=(theirs, worker, num_workers), daemon=True)
                    process.start()
                workers.append((process, ours))
                work.send(ours)
            del work  # the workers hold its memory
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            for worker, (process, channel) in enumerate(workers):
                try:
                    kind, content = receive(channel)
                    if kind == "item":
                        channel.send(b"+")
                except (EOFError, ConnectionError):  # the latter if it dies between the two, or with words unread
                    raise _describe_death(worker, process) from None
                if kind == "end":
                    return
                if kind == "error":
                    raise content
                yield content
    finally:
        if workers:  # otherwise the interpreter has ended them and may already have cleared its modules
            end_all()
            atexit.unregister(end_all)


def _describe_death(worker: int, process) -> RunError:
    process.join(timeout=10)
    status = process.exitcode
    how = f"was killed by signal {-status}" if status and status < 0 else f"ended with status {status}"
    hint = "; if memory ran out, use fewer or smaller batches" if status == -signal.SIGKILL else ""
    return RunError(f"worker process {worker} of data.num_workers {how}{hint}")


def _work(channel: socket.socket, worker: int, num_workers: int) -> None:
    """Prepare the items of one worker and send them, at most _ITEMS_AHEAD before they are taken."""
    ignore_pillow_warnings()
    room = threading.Semaphore(_ITEMS_AHEAD)
    items_of = receive(channel)
    threading.Thread(target=_watch, args=(channel, room), daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the parent has died: `_watch` ends this process
        try:
            for item in items_of(worker, num_workers):
                room.acquire()
                Message(("item", item)).send(channel)
            Message(("end", None)).send(channel)
        except Exception as error:
            Message(("error", error)).send(channel)
    threading.Event().wait()  # for the parent, which ends this process


def _watch(channel: socket.socket, room: threading.Semaphore) -> None:
    """Count what the parent takes. End this process at once if the parent has closed its end or died."""
    try:
        while taken := channel.recv(64):
            room.release(len(taken))
    finally:
        os._exit(0)
