"""Joining the processes of a run: JAX's own service first, then the group that ends them together."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from mvar_jax.errors import InputError, shorten
from mvar_jax.processes import group
from mvar_jax.processes.cluster import VARIABLES, Place, check_devices, count_cards, find_place
from mvar_jax.processes.hub import Hub
from mvar_jax.processes.patience import read_seconds

OFF = "off"
AUTO = "auto"
PORT_VARIABLE = "MVAR_PORT"
# JAX aborts all processes if it does not hear of one for so long. The hub learns at once of a process that ended, and
# after messages.VANISHED_S of a host that vanished. A host that stands still for less may go on.
HEARTBEAT_S = 100
_SHUTDOWN_S = 30
MEET_VARIABLE = "MVAR_MEET_SECONDS"
MEET_S = 300.0  # a process that waits for the others longer gives up
MEET_BELOW_S = 10**6
_AFTER_MEET_S = 60  # JAX, which would abort the process, gives up so much later
_REFUSAL_S = 5.0  # how long the first process waits for the others to read why it refuses
_PREEMPTION_OPTION = "jax_enable_preemption_service"
_GROUP_KEY = "mvar_jax/group"


def join(option: str) -> None:
    """Join the other processes as `--distributed` says; call before anything touches a device.

    Wait for 300 s, or MVAR_MEET_SECONDS. Signals are answered meanwhile: JAX's own wait, which is deaf to them, has a
    thread of its own.

    Raises InputError for an unusable option, or if the processes do not meet.
    """
    if option == OFF:
        return
    import jax

    place = find_place(os.environ, parse_distributed(option), count_cards())
    seconds, alone = read_seconds(MEET_VARIABLE, MEET_S, MEET_BELOW_S), group.current()
    # the end of the process must not wait for JAX's thread: a group of several leaves at once
    group.set_current(group.Group(place.process_id or 0, max(2, place.num_processes or 0)))
    try:
        joined = _call_in_thread(lambda: _meet(option, place, int(seconds) + _AFTER_MEET_S), seconds)
    except TimeoutError:
        words = f"--distributed={option}: the processes of the run did not meet: {_describe_wait(place, seconds)}"
        raise InputError(words, field="distributed", given=option, expected="processes that can meet") from None
    except InputError:
        if _jax_state().client is None:  # no thread of JAX's has begun
            group.set_current(alone)
        raise
    group.set_current(joined)
    check_devices(place, jax.local_device_count(), jax.default_backend())


def join_initialized() -> None:
    """Join the group if the caller of this library has called `jax.distributed.initialize` itself."""
    if group.current().count == 1 and (_jax_state().num_processes or 1) > 1:
        group.set_current(_join_group())


def start_preemption_service() -> None:
    """Let JAX take SIGTERM from now on: it agrees with the other processes on a step at which all stop.

    `join` does not, because only the training loop asks for that step: other commands would never hear of a SIGTERM.
    """
    state = _jax_state()
    if state.client is not None and state.preemption_sync_manager is None:
        state.initialize_preemption_sync_manager()


def part() -> None:
    """Part from the other processes of a run that is complete in all of them."""
    here = group.current()
    if here.count == 1:
        return
    here.wait_for_all("the end")
    here.close()
    group.set_current(group.Group())


def _meet(option: str, place: Place, timeout_s: int) -> group.Group:
    """Return the group of this process, after waiting for all others."""
    import jax

    is_enabled = getattr(jax.config, _PREEMPTION_OPTION)
    jax.config.update(_PREEMPTION_OPTION, False)  # see `start_preemption_service`
    try:
        jax.distributed.initialize(
            **place.arguments,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        if place.how == "JAX" and "coordinator_address should be defined" in str(error):
            words = f"--distributed={option} found neither {VARIABLES[0]} nor Open MPI, Slurm or a TPU slice: use "
            words += f"--distributed={OFF} for one process, or set {', '.join(VARIABLES[:2])} and {VARIABLES[2]}"
            raise InputError(words, field="distributed", given=option, expected=OFF) from None
        words = f"--distributed={option}: the processes of the run did not meet: {shorten(error)}"
        raise InputError(words, field="distributed", given=option, expected="processes that can meet") from None
    finally:
        jax.config.update(_PREEMPTION_OPTION, is_enabled)
    return _join_group()


def _join_group() -> group.Group:
    state = _jax_state()
    client, address, index, count = state.client, state.coordinator_address, state.process_id, state.num_processes
    if count == 1 or client is None or address is None:
        return group.Group()
    if index == 0:
        try:
            hub = _open_hub(count)
        except InputError as error:
            client.key_value_set(_GROUP_KEY, json.dumps({"refusal": str(error)}))
            _wait_for_readers(client, count)
            raise
        client.key_value_set(_GROUP_KEY, json.dumps({"port": hub.port, "token": hub.token}))
    try:
        found = json.loads(client.blocking_key_value_get(_GROUP_KEY, 1000 * group.CONNECT_S))
    except RuntimeError as error:
        words = f"process {index} of {count} met process 0, which then said nothing for {group.CONNECT_S} s: "
        raise InputError(words + shorten(error), field="distributed", expected="processes that can meet") from None
    if "refusal" in found:
        client.key_value_set(f"{_GROUP_KEY}/read/{index}", "")
        raise InputError(found["refusal"], field=PORT_VARIABLE, expected="a free port on the host of process 0")
    host = "localhost" if index == 0 else address.rsplit(":", 1)[0].strip("[]")
    return group.JoinedGroup(index, count, (host, found["port"]), found["token"])


def _open_hub(count: int) -> Hub:
    """Return the hub at the port that MVAR_PORT names. Raises InputError if it names none, or none that is free."""
    text = os.environ.get(PORT_VARIABLE, "0")
    if not text.isdecimal() or int(text) >= 2**16:
        words = f"{PORT_VARIABLE} must be a port from 0 (any free one) to 65535, got {text!r}"
        raise InputError(words, field=PORT_VARIABLE, given=text, expected="0 to 65535")
    try:
        return Hub(count, int(text))
    except OSError as error:
        words = f"{PORT_VARIABLE}={text} cannot be used on the host of process 0 ({os.strerror(error.errno or 0)}): "
        words += "choose a free port, or 0 for any"
        raise InputError(words, field=PORT_VARIABLE, given=text, expected="a free port") from None


def _wait_for_readers(client: Any, count: int) -> None:
    """Wait until the other processes have read why this one refuses, at most _REFUSAL_S.

    Without it JAX would abort them, because process 0 has left, before they can say the reason.
    """
    deadline = time.monotonic() + _REFUSAL_S
    for index in range(1, count):
        try:
            left_ms = max(1, int(1000 * (deadline - time.monotonic())))
            client.blocking_key_value_get(f"{_GROUP_KEY}/read/{index}", left_ms)
        except RuntimeError:
            return
    time.sleep(1)  # in which they leave


def _call_in_thread(function: Callable[[], Any], seconds: float) -> Any:
    """Return what a function returns, or raise what it raises; signals are answered meanwhile.

    Raises TimeoutError after so many seconds. The thread then lives on.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, name="join", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(0.2)
        if thread.is_alive() and time.monotonic() > deadline:
            raise TimeoutError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _describe_wait(place: Place, seconds: float) -> str:
    """Return for whom this process waited in vain."""
    state = _jax_state()
    index, count = state.process_id or place.process_id or 0, state.num_processes or place.num_processes
    address = state.coordinator_address or place.coordinator_address
    me = f"process {index} of {count}" if count else f"process {index}"
    if not address or index == 0:
        return f"{me} waited {seconds:g} s for the others{f' at {address}' if address else ''}"
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        reason = f"process 0 does not answer at {address} ({shorten(error)})"
    else:
        reason = "process 0 waits too"
    return f"{me} waited {seconds:g} s for the others, {reason}"


def _jax_state() -> Any:
    # JAX has no public call for its key-value store or preemption service; Orbax uses this one too.
    from jax._src.distributed import global_state

    return global_state


def parse_distributed(option: str) -> tuple[str, int, int] | None:
    """Return (HOST:PORT, number of processes, number of this one), or None if the environment names them."""
    if option == AUTO:
        return None
    parts = option.split(",")
    is_complete = len(parts) == 3 and ":" in parts[0] and parts[1].isdecimal() and parts[2].isdecimal()
    if not is_complete or int(parts[2]) >= int(parts[1]):
        expected = "off, auto, or HOST:PORT,NUM,INDEX such as 10.0.0.1:1234,2,0"
        words = f"--distributed must be {expected}, got {option}"
        raise InputError(words, field="distributed", given=option, expected=expected)
    return parts[0], int(parts[1]), int(parts[2])
