"""Holders of a folder are real processes; what they leave is seen in the folder and in their exit statuses."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mvar_jax.errors import InputError
from mvar_jax.files import locks
from mvar_jax.files.paths import as_path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60


@pytest.fixture
def start():
    """Start holders; all are killed at the end."""
    started = []

    def start(folder, *options, seconds=600):
        environment = os.environ | {"PYTHONPATH": str(ROOT), locks.SECONDS_VARIABLE: str(seconds)}
        command = [sys.executable, str(ROOT / "tests/files/hold_case.py"), str(folder), *options]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process) -> str:
    """What a holder prints first: held, or why not."""
    lines = []
    reader = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)
    reader.start()
    reader.join(DEADLINE_S)
    assert lines, "the process said nothing"
    return lines[0].strip()


def end(process) -> tuple[int, str]:
    """Let a holder end; return its exit status and standard error."""
    errors = process.communicate(timeout=DEADLINE_S)[1]
    return process.returncode, errors


KINDS = ["flock", "noflock", "s3", "gcs"]


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    """(folder, options of a holder) of each kind of storage."""
    if request.param in ("s3", "gcs"):
        store = request.getfixturevalue(request.param)
        return as_path(store.url) / tmp_path.name, ()
    return tmp_path, ("noflock",) * (request.param == "noflock")


def test_held_folder_is_refused_with_the_name_of_the_holder_and_free_when_it_ends(start, place):
    folder, options = place
    first = start(folder, *options, seconds=6)
    assert first_line(first) == "held"
    second = start(folder, *options, seconds=6)
    refusal = first_line(second)
    assert refusal.startswith(f"out {folder} is in use by another run, process {first.pid} on "), refusal
    assert end(second)[0] == 2
    assert end(first)[0] == 0
    third = start(folder, *options)
    assert first_line(third) == "held" and end(third)[0] == 0
    assert not folder.is_dir() or list(folder.iterdir()) == []


def test_holder_that_was_killed_on_this_machine_is_recognised_at_once(start, place):
    """Its lease would hold for 10 minutes, and this waits for one."""
    folder, options = place
    first = start(folder, *options)
    assert first_line(first) == "held"
    first.kill()  # not waited for: what is left of it still has its process id
    second = start(folder, *options)
    assert first_line(second) == "held" and end(second)[0] == 0


def test_process_that_leaves_abruptly_removes_its_lease(start, tmp_path):
    process = start(tmp_path, "noflock", "leave")
    assert first_line(process) == "held" and (tmp_path / locks.LEASE_FILE).exists()
    assert end(process)[0] == 3 and not (tmp_path / locks.LEASE_FILE).exists()


def test_lock_file_that_another_machine_has_removed_is_made_again(tmp_path, monkeypatch):
    """NFS answers ESTALE for the name of a file that it still remembers."""
    left = [1]

    def stat(path, *rest, stat=Path.stat, **options):
        if path.name == locks.LOCK_FILE and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, *rest, **options)

    monkeypatch.setattr(Path, "stat", stat)
    lock = locks.acquire(tmp_path, "out")
    assert left == [0] and (tmp_path / locks.LOCK_FILE).exists()
    lock.release()


def test_missing_locks_are_said_with_what_is_kept_instead(start, tmp_path):
    process = start(tmp_path, "noflock")
    assert first_line(process) == "held"
    holder = json.loads((tmp_path / locks.LEASE_FILE).read_text())
    assert holder["pid"] == process.pid
    words = f"out {tmp_path}: its file system has no locks (No locks available); the lease .lease is kept instead\n"
    assert end(process) == (0, words)


def write_foreign_lease(folder, seconds, beat=0):
    holder = {"host": "node-7", "pid": 1, "started": "1", "machine": "elsewhere", "holder": "ab", "beat": beat}
    holder["seconds"] = seconds
    (folder / locks.LEASE_FILE).write_text(json.dumps(holder))


def test_lease_of_another_machine_expires_when_its_holder_said(start, tmp_path):
    write_foreign_lease(tmp_path, seconds=2)
    process = start(tmp_path, "noflock", seconds=3600)
    assert first_line(process) == "held"
    errors = end(process)[1]
    assert "a lease of process 1 on node-7: waiting up to 2 s" in errors and "has expired and is taken over" in errors


def test_lease_of_another_machine_that_is_renewed_is_respected(start, tmp_path):
    write_foreign_lease(tmp_path, seconds=600)
    process = start(tmp_path, "noflock", seconds=1)
    for beat in range(1, DEADLINE_S * 10):
        write_foreign_lease(tmp_path, 600, beat)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    refusal = first_line(process)
    assert refusal == f"out {tmp_path} is in use by another run, process 1 on node-7" and end(process)[0] == 2
    assert json.loads((tmp_path / locks.LEASE_FILE).read_text())["holder"] == "ab"


def test_of_several_that_find_a_dead_lease_one_takes_it(start, tmp_path):
    dead = start(tmp_path, "noflock")
    assert first_line(dead) == "held"
    dead.kill()
    rivals = [start(tmp_path, "noflock", seconds=12) for _ in range(4)]
    answers = [first_line(rival) for rival in rivals]
    assert answers.count("held") == 1, answers
    (winner,) = (rival for rival, answer in zip(rivals, answers, strict=True) if answer == "held")
    assert json.loads((tmp_path / locks.LEASE_FILE).read_text())["pid"] == winner.pid


def test_lease_that_another_takes_at_the_same_moment_is_not_ours(tmp_path, monkeypatch):
    """The other removed a dead lease after us, and with it ours; afterwards it renews its own."""
    beats = iter(range(1000))
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    monkeypatch.setattr(time, "sleep", lambda _: write_foreign_lease(tmp_path, 600, next(beats)))
    with pytest.raises(InputError, match="is in use by another run, process 1 on node-7"):
        locks.acquire(tmp_path, "out")


def test_process_that_stood_still_for_longer_than_its_lease_ends(start, tmp_path):
    first = start(tmp_path, "noflock", seconds=2)
    assert first_line(first) == "held"
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path, "noflock", seconds=2)
    assert first_line(second) == "held"
    first.send_signal(signal.SIGCONT)
    first.wait(DEADLINE_S)
    errors = first.stderr.read()
    assert first.returncode == -signal.SIGTERM and f"was taken over by process {second.pid} on " in errors
    assert json.loads((tmp_path / locks.LEASE_FILE).read_text())["pid"] == second.pid


def test_file_that_its_holder_removed_after_it_was_opened_holds_nothing(tmp_path, monkeypatch):
    first, flock = locks.acquire(tmp_path, "out"), fcntl.flock

    def release_first(*arguments):
        first.release()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", release_first)
    second = locks.acquire(tmp_path, "out")
    with pytest.raises(InputError, match="is in use by another run"):
        locks.acquire(tmp_path, "out")
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir .*file/run cannot be written: "):
        locks.acquire(tmp_path / "file/run", "workdir")


def test_folder_whose_name_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"out must be a path in UTF-8, got '.*caf\\udce9'"):
        locks.acquire(tmp_path / os.fsdecode(b"caf\xe9"), "out")
    assert not list(tmp_path.iterdir())


def test_lease_of_no_sensible_length_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(locks.SECONDS_VARIABLE, "soon")
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with pytest.raises(InputError, match="MVAR_LEASE_SECONDS must be a number of seconds above 0.*'soon'"):
        locks.acquire(tmp_path, "workdir")


def test_release_does_not_wait_for_a_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(locks, "_LEAVE_S", 0.1)
    answered, is_released = threading.Event(), threading.Event()

    class Slow:
        def release(self):
            answered.wait(DEADLINE_S)
            is_released.set()

    locks.release_now(Slow())
    assert not is_released.is_set()
    answered.set()
    assert is_released.wait(DEADLINE_S)
