"""Processes that wait for each other: what ends the wait, with which status, and what is said."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_kill import ROOT, end_all, free_address

from mvar_jax.errors import InputError
from mvar_jax.processes.join import join

END_S = 30  # in which a process that is told to end has ended, on a busy machine too


def start(option, **environment):
    return subprocess.Popen(
        [sys.executable, "tests/processes/join_case.py", option],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pair(**environment):
    address = free_address()
    return [start(f"{address},2,{index}", **environment) for index in range(2)]


def wait_for(word, process):
    assert process.stdout.readline() == f"{word}\n", process.stderr.read()


def errors_of(text):
    """Return this program's own lines: JAX writes others."""
    assert "Traceback" not in text and "Check failure" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait_for_the_others_at_once(index, number, status):
    process = start(f"{free_address()},2,{index}")
    wait_for("joining", process)
    time.sleep(3)  # in JAX's wait, unless the machine is slow: then this tests less
    process.send_signal(number)
    statuses, _, errors = end_all([process], END_S)
    assert statuses == [status] and errors_of(errors[0]) == []


def test_processes_that_do_not_meet_say_so_in_one_line():
    """Two of three, and one whose first process is not there."""
    address, nowhere = free_address(), free_address()
    waits = {f"{address},3,0": "6", f"{address},3,1": "4", f"{nowhere},2,1": "4"}
    processes = [start(option, MVAR_MEET_SECONDS=seconds) for option, seconds in waits.items()]
    statuses, _, errors = end_all(processes, 60)
    assert statuses == [2, 2, 2]
    words = "error: --distributed={},{}: the processes of the run did not meet: process {} waited {} s for the others"
    assert errors_of(errors[0]) == [words.format(address, "3,0", "0 of 3", 6) + f" at {address}"]
    (error,) = errors_of(errors[1])
    assert error.startswith(words.format(address, "3,1", "1 of 3", 4) + ", process 0 ")
    (error,) = errors_of(errors[2])
    assert error.startswith(words.format(nowhere, "2,1", "1 of 2", 4) + f", process 0 does not answer at {nowhere} (")


def test_a_signal_after_joining_ends_both():
    """`jax.distributed.initialize` puts a handler in place of ours, to which only the training loop listens."""
    pair = start_pair()
    for process in pair:
        wait_for("joining", process)
    for process in pair:
        wait_for("joined", process)
    pair[1].send_signal(signal.SIGTERM)
    statuses, _, errors = end_all(pair, END_S)
    assert statuses == [75, 75], errors
    assert "process 1 of 2: stopped by SIGTERM; the same command continues\n" in errors[0]


def test_a_port_in_use_is_named_by_both_in_one_line():
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        statuses, _, errors = end_all(start_pair(MVAR_PORT=str(port)), 60)
    assert statuses == [2, 2], errors
    for text in errors:
        (error,) = errors_of(text)
        assert error.startswith(f"error: MVAR_PORT={port} cannot be used on the host of process 0 (Address")


def test_a_port_that_is_none_is_named_by_both_in_one_line():
    statuses, _, errors = end_all(start_pair(MVAR_PORT="many"), 60)
    assert statuses == [2, 2], errors
    for text in errors:
        assert errors_of(text) == ["error: MVAR_PORT must be a port from 0 (any free one) to 65535, got 'many'"]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf"])
def test_a_wait_that_is_none_is_refused_in_one_line(monkeypatch, text):
    monkeypatch.setenv("MVAR_MEET_SECONDS", text)
    with pytest.raises(InputError) as caught:
        join("localhost:1,2,0")
    words = "MVAR_MEET_SECONDS must be a number of seconds above 0 and below 1000000, got "
    assert str(caught.value) == words + repr(text)
