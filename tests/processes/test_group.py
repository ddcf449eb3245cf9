"""Groups of real processes, without JAX: what one of them suffers ends all, soon, with one status and one reason."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvar_jax.processes import join
from mvar_jax.processes.group import JoinedGroup
from mvar_jax.processes.hub import Hub
from mvar_jax.processes.messages import Connection
from mvar_jax.stopping import LOST_STATUS

ROOT = Path(__file__).parents[2]
COUNT = 4


class Members:
    """The processes of one group."""

    def __init__(self, folder: Path, scenario: str, more=lambda index: (), environment=None):
        self.processes = [
            subprocess.Popen(
                [sys.executable, "tests/processes/plain_group.py", str(index), str(COUNT), str(folder / "address")]
                + [scenario, *more(index)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(COUNT)
        ]

    def wait_for_start(self):
        for process in self.processes:
            assert process.stdout.readline() == "started\n", process.communicate()

    def finish(self):
        """Wait for all within the 15 s that a run is given to end; return (statuses, outputs, errors)."""
        deadline, results = time.monotonic() + 15, []
        for process in self.processes:
            results.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
        outputs, errors = zip(*results, strict=True)
        return [process.returncode for process in self.processes], list(outputs), list(errors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()


def test_values_are_gathered_by_process(tmp_path):
    with Members(tmp_path, "gather") as members:
        statuses, outputs, errors = members.finish()
    assert statuses == [0] * COUNT, errors
    assert outputs == ["[0, 1, 4, 9] [0, 1, 2, 3]\n"] * COUNT


@pytest.mark.parametrize(
    ("scenario", "status", "reason"),
    [
        ("refuse", 2, "error: process 2 of 4: workdir w cannot be written: no space\n"),
        ("crash", 1, "error: process 1 of 4: ZeroDivisionError: by zero\n"),
        ("crossed", 1, "error: process 0 of 4: the processes wait for different things: door 0, door 1\n"),
        ("both", 2, "error: process 1 of 4: reason of 1\n"),
    ],
)
def test_an_error_of_one_ends_all_with_its_status_and_its_reason_once(tmp_path, scenario, status, reason):
    with Members(tmp_path, scenario) as members:
        members.wait_for_start()
        statuses, outputs, errors = members.finish()
    assert statuses == [status] * COUNT
    assert errors[0].endswith(reason) and "".join(errors).count("error: ") == 1
    assert outputs == ["left\n"] * COUNT, "what is registered for leaving is called"
    assert ("Traceback" in errors[1]) == (scenario == "crash"), "only what nobody foresaw needs a traceback"


def test_a_stop_of_one_stops_all_and_is_no_error(tmp_path):
    with Members(tmp_path, "stop") as members:
        statuses, _, errors = members.finish()
    assert statuses == [75] * COUNT
    assert errors[0] == "process 3 of 4: stopped by SIGTERM; the same command continues\n" and not any(errors[1:])


@pytest.mark.parametrize("victim", range(COUNT))
def test_a_killed_process_ends_all(tmp_path, victim):
    with Members(tmp_path, "wait") as members:
        members.wait_for_start()
        members.processes[victim].kill()
        statuses, _, errors = members.finish()
    assert statuses == [-signal.SIGKILL if index == victim else LOST_STATUS for index in range(COUNT)]
    if victim:
        assert errors[0].startswith(f"error: process {victim} of 4: it ended without a word")
        assert "".join(errors).count("error: ") == 1
    else:
        assert all(error.startswith("error: the first process ended without a word") for error in errors[1:])


def test_different_values_are_refused_by_all_and_named(tmp_path):
    with Members(tmp_path, "differ") as members:
        statuses, _, errors = members.finish()
    assert statuses == [2] * COUNT
    assert "process 2 of 4 has train data samples=11, process 0 has samples=10" in errors[0]


@pytest.mark.parametrize("storage", ["shared", "slow"])
def test_shared_storage_is_accepted_and_left_clean(tmp_path, storage):
    """Slow: one process sees new files two seconds late."""
    with Members(tmp_path, storage, lambda index: [str(tmp_path / "shared")]) as members:
        statuses, _, errors = members.finish()
    assert statuses == [0] * COUNT, errors
    assert list((tmp_path / "shared").iterdir()) == []


def test_storage_of_its_own_is_refused_by_all_and_the_process_named(tmp_path):
    folder_of = lambda index: tmp_path / ("other" if index == 2 else "shared")
    environment = {"MVAR_SHARED_SECONDS": "1"}
    with Members(tmp_path, "shared", lambda index: [str(folder_of(index))], environment) as members:
        statuses, _, errors = members.finish()
    assert statuses == [2] * COUNT
    assert "must be on storage that all processes share: process 2 of 4" in errors[0]
    assert not (tmp_path / "shared").exists() and not (tmp_path / "other").exists()


def test_storage_that_cannot_be_written_is_refused_by_all(tmp_path):
    (tmp_path / "file").write_text("")
    with Members(tmp_path, "shared", lambda index: [str(tmp_path / "file")]) as members:
        statuses, _, errors = members.finish()
    assert statuses == [2] * COUNT and "workdir" in errors[0] and "cannot be written" in errors[0]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="options of Linux")
def test_connections_outlive_a_pause_and_notice_a_vanished_host_before_jax_aborts():
    """The kernel's own options, on both ends: no test here can take a host away."""
    hub = Hub(1)
    member = JoinedGroup(0, 1, ("localhost", hub.port), hub.token)
    assert member.gather("n", 1) == [1]
    for sock in (member._connection.socket, hub._members[0].socket):
        option = lambda name, sock=sock: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        silent_s = option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT")
        assert 60 <= silent_s < join.HEARTBEAT_S and option("TCP_USER_TIMEOUT") == 1000 * silent_s
    member.close()


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"index": 1, "token": "x"}\n', b""])
def test_strangers_are_not_let_in(text):
    hub = Hub(2)
    with socket.create_connection(("localhost", hub.port), timeout=10) as stranger:
        stranger.sendall(text)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    members = []
    for index in range(2):
        member = Connection(socket.create_connection(("localhost", hub.port), timeout=10))
        member.send(index=index, token=hub.token)
        member.send(kind="value", name="n", value=index)
        members.append(member)
    for member in members:
        assert member.receive() == [{"kind": "gathered", "values": [0, 1]}]
        member.send(kind="done")
        member.close()
