"""Joining the processes of a run: JAX's own service first, then the group that ends them together."""

import os

from mvar_jax.errors import InputError, shorten
from mvar_jax.processes import group
from mvar_jax.processes.cluster import VARIABLES, check_devices, count_cards, find_place
from mvar_jax.processes.hub import Hub

OFF = "off"
AUTO = "auto"
PORT_VARIABLE = "MVAR_PORT"
# JAX's notice of a lost process is the second way to learn of it, for hosts that vanish without closing connections.
_HEARTBEAT_S = 10
_SHUTDOWN_S = 30
_GROUP_KEY = "mvar_jax/group"


def join(option: str) -> None:
    """Join the other processes as `--distributed` says; call before anything touches a device.

    Raises InputError for an unusable option, or if the processes do not meet.
    """
    if option == OFF:
        return
    import jax

    place = find_place(os.environ, parse_distributed(option), count_cards())
    try:
        jax.distributed.initialize(
            **place.arguments, heartbeat_timeout_seconds=_HEARTBEAT_S, shutdown_timeout_seconds=_SHUTDOWN_S
        )
    except (ValueError, RuntimeError) as error:
        if place.how == "JAX" and "coordinator_address should be defined" in str(error):
            words = f"--distributed={option} found neither {VARIABLES[0]} nor Open MPI, Slurm or a TPU slice: use "
            words += f"--distributed={OFF} for one process, or set {', '.join(VARIABLES[:2])} and {VARIABLES[2]}"
            raise InputError(words, field="distributed", given=option, expected=OFF) from None
        words = f"--distributed={option}: the processes of the run did not meet: {shorten(error)}"
        raise InputError(words, field="distributed", given=option, expected="processes that can meet") from None
    group.set_current(_join_group())
    check_devices(place, jax.local_device_count(), jax.default_backend())


def join_initialized() -> None:
    """Join the group if the caller of this library has called `jax.distributed.initialize` itself."""
    from jax._src.distributed import global_state as state

    if group.current().count == 1 and (state.num_processes or 1) > 1:
        group.set_current(_join_group())


def part() -> None:
    """Part from the other processes of a run that is complete in all of them."""
    here = group.current()
    if here.count == 1:
        return
    here.wait_for_all("the end")
    here.close()
    group.set_current(group.Group())


def _join_group() -> group.Group:
    # JAX has no public call for its key-value store; Orbax uses this one too.
    from jax._src.distributed import global_state as state

    client, address = state.client, state.coordinator_address
    if state.num_processes == 1 or client is None or address is None:
        return group.Group()
    if state.process_id == 0:
        hub = Hub(state.num_processes, _port())
        client.key_value_set(_GROUP_KEY, f"{hub.port} {hub.token}")
    port, token = client.blocking_key_value_get(_GROUP_KEY, 1000 * group.CONNECT_S).split()
    host = "localhost" if state.process_id == 0 else address.rsplit(":", 1)[0].strip("[]")
    return group.JoinedGroup(state.process_id, state.num_processes, (host, int(port)), token)


def _port() -> int:
    text = os.environ.get(PORT_VARIABLE, "0")
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    words = f"{PORT_VARIABLE} must be a port from 0 (any free one) to 65535, got {text!r}"
    raise InputError(words, field=PORT_VARIABLE, given=text, expected="0 to 65535")


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
