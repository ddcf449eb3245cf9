"""Worker processes end with their parent, leave nothing behind and share what need not be copied."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mvar_jax.data.shared_memory import Message, SharedArray
from mvar_jax.data.workers import run_workers
from mvar_jax.errors import RunError

PROGRAM = Path(__file__).with_name("worker_run.py")
SHARED_MEMORY = Path("/dev/shm")
DEADLINE_S = 60


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _session(leader: int) -> list[int]:
    """The processes that `leader` and its children started and that are still alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def _wait_until(holds, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("way", "status"),
    [("take", 0), ("images", 0), ("close", 0), ("raise", 3), ("os._exit", 5), ("wait", -signal.SIGKILL)],
)
def test_nothing_is_left_of_workers_however_their_parent_ends(way, status):
    before = set(SHARED_MEMORY.iterdir())
    command = [sys.executable, str(PROGRAM), way]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as parent:
        try:
            workers = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(workers) == 2, parent.stderr.read()
            if way == "wait":
                assert set(SHARED_MEMORY.iterdir()) == before
                assert all(map(_is_alive, workers))
                parent.kill()
            assert parent.wait(DEADLINE_S) == status
            _wait_until(lambda: not _session(parent.pid), f"of {workers} are left {_session(parent.pid)}")
            assert parent.stderr.read() == ""
        finally:
            for pid in _session(parent.pid):
                os.kill(pid, signal.SIGKILL)
    assert set(SHARED_MEMORY.iterdir()) == before


def test_workers_need_no_shared_memory_folder():
    mount = f'mount -t tmpfs -o size=64k tmpfs {SHARED_MEMORY} && exec "$@"'
    alone = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, "bash"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a small /dev/shm of its own")
    run = subprocess.run([*alone, sys.executable, PROGRAM, "take"], capture_output=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr.decode()


def _numbers(worker, num_workers):
    yield from range(worker, 7, num_workers)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_items_come_in_order_up_to_the_last(num_workers):
    assert list(run_workers(_numbers, num_workers)) == list(range(7))


def test_killed_worker_is_named_with_its_signal():
    items = run_workers(lambda worker, num_workers: itertools.count(worker, num_workers), 2)
    next(items)
    workers = sorted(child.pid for child in multiprocessing.active_children())
    os.kill(workers[1], signal.SIGKILL)
    words = "worker process . of data.num_workers was killed by signal 9; if memory ran out, use fewer"
    with pytest.raises(RunError, match=words):
        for _ in range(10):
            next(items)
    _wait_until(lambda: not any(map(_is_alive, workers)), "the other worker outlives the iterator")


def test_worker_that_dies_before_its_item_is_taken_is_named_too():
    items = run_workers(lambda worker, num_workers: itertools.count(worker, num_workers), 1)
    next(items)
    (worker,) = multiprocessing.active_children()
    time.sleep(0.5)  # its next items are on their way
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(RunError, match=r"worker process 0 of data\.num_workers was killed by signal 9"):
        for _ in range(10):
            next(items)


def test_signals_to_all_processes_end_no_worker():
    items = run_workers(lambda worker, num_workers: itertools.count(worker, num_workers), 2)
    taken = [next(items)]
    workers = [child.pid for child in multiprocessing.active_children()]
    for pid, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        os.kill(pid, number)
    taken += [next(items) for _ in range(9)]
    items.close()
    assert taken == list(range(10))


def test_shared_array_is_one_piece_of_memory_in_all_workers():
    shared = SharedArray((2, 3), np.int64)

    def write(worker, num_workers):
        shared.array[worker] = 10 + worker
        yield worker

    assert list(run_workers(write, 2)) == [0, 1]
    assert shared.array.tolist() == [[10] * 3, [11] * 3]


def test_arrays_of_a_message_belong_to_those_who_receive_it():
    array = np.zeros(1000)

    def write(worker, num_workers):
        array[:] += 1 + worker
        yield array

    sums = [found.sum() for found in run_workers(write, 2)]
    assert sums == [1000, 2000] and array.sum() == 0


def test_shared_array_takes_no_room_in_a_message():
    assert Message([SharedArray((2**20,), np.uint8)]).num_bytes < 1000
