"""What a cluster says of a process: its number among the others, and the cards that it may use.

JAX gives each process of Slurm and Open MPI one card, number LOCALID of those it sees. That is right for one task a
card if a task sees all cards of its node, and wrong for one task a node (it leaves cards idle) and for tasks that see
only their own card (it asks for one that is not there). `find_place` tells these cases apart.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))

_Processes = tuple[str | None, int | None, int | None]  # address of the first, their number, number of this one


@dataclass(frozen=True)
class Place:
    """A process among those of its run.

    Attributes:
      how: who named the processes: "option", "variables", "Open MPI", "Slurm", or "JAX" if JAX looks for them itself.
      coordinator_address: HOST:PORT of the first process; None lets JAX find it.
      num_processes: processes of the run; None lets JAX find it.
      process_id: number of this process; None lets JAX find it.
      local_device_ids: indices of the cards to use, counted over the visible ones; () uses all of these.
      num_devices: cards that this process was given; None if nobody says.
    """

    how: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] = ()
    num_devices: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `jax.distributed.initialize`."""
        return {
            "coordinator_address": self.coordinator_address,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
            # not None, which would let JAX choose one card; an empty list restricts nothing
            "local_device_ids": list(self.local_device_ids),
        }


@dataclass(frozen=True)
class _Node:
    """The tasks and cards of one node.

    Attributes:
      num_tasks: processes of this run on the node.
      local_id: number of this process among them.
      num_cards: cards of the node for all of them together; None if unknown.
      is_scheduled: whether a scheduler gave these cards, so that none may lie idle.
      visible: entries of CUDA_VISIBLE_DEVICES; None if it is not set.
    """

    num_tasks: int
    local_id: int
    num_cards: int | None
    is_scheduled: bool
    visible: tuple[str, ...] | None


def find_place(
    environment: Mapping[str, str], given: tuple[str, int, int] | None = None, num_cards: int | None = None
) -> Place:
    """Return how this process joins its run, from the environment alone.

    Args:
      environment: the variables of the process.
      given: HOST:PORT, number of processes and number of this one, if an option names them.
      num_cards: cards of this machine (`count_cards`), for clusters that set no variable for them.

    Raises:
      InputError: if the variables contradict each other, or the cards of a node cannot be divided among its tasks.
    """
    how, (address, number, index) = ("option", given) if given else _find_processes(environment)
    ids: tuple[int, ...] = ()
    num_devices: int | None = None
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        ids = _parse_device_ids(environment["JAX_LOCAL_DEVICE_IDS"])
        num_devices = len(ids)
    elif environment.get("JAX_PLATFORMS", "").split(",")[0] != "cpu":
        ids, num_devices = _divide_cards(_find_node(environment, num_cards))
    return Place(how, address, number, index, ids, num_devices)


def count_cards(folder: Path = Path("/dev")) -> int | None:
    """Return the number of NVIDIA cards that this machine or container has; None if it has none."""
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in folder.glob("nvidia*")) or None


def check_devices(place: Place, num_local_devices: int, platform: str) -> None:
    """Raise InputError if this process sees fewer devices than it was given: the others would lie idle.

    Args:
      place: the place of this process.
      num_local_devices: devices that JAX sees in this process.
      platform: their platform, such as "gpu" or "cpu".
    """
    if place.num_devices is None:
        return
    expected = f"{place.num_devices} devices"
    if platform == "cpu":
        message = (
            f"this process was given {_count(place.num_devices, 'card')}, but jax sees none and would use the CPU: "
            "install jax[cuda12] (EXTRAS=cuda12 bash launch/setup.sh) or jax[cuda13], or set JAX_PLATFORMS=cpu if "
            "the CPU is meant"
        )
        raise InputError(message, field="devices", given=platform, expected=expected)
    if num_local_devices < place.num_devices:
        message = (
            f"this process sees {num_local_devices} of the {_count(place.num_devices, 'card')} that it was given: "
            "let CUDA_VISIBLE_DEVICES and the scheduler's binding show them all, or name those to use in "
            "JAX_LOCAL_DEVICE_IDS"
        )
        raise InputError(message, field="devices", given=num_local_devices, expected=expected)


def describe(devices: Iterable, mesh: Mapping[str, int]) -> str:
    """Return the first line of a run, such as "2 processes x 8 devices (NVIDIA H100), mesh data=16".

    Args:
      devices: all devices of the run, as `jax.devices()` returns them.
      mesh: size of each axis of the mesh; axes of size 1 are left out.
    """
    devices = list(devices)
    counts = Counter(device.process_index for device in devices)
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    if len(set(counts.values())) == 1:
        processes = f"{_count(len(counts), 'process', 'processes')} x {_count(counts.most_common()[0][1], 'device')}"
    else:
        processes = f"{len(counts)} processes with {', '.join(str(counts[i]) for i in sorted(counts))} devices"
    axes = " ".join(f"{name}={size}" for name, size in mesh.items() if size > 1)
    return f"{processes} ({kinds})" + (f", mesh {axes}" if axes else "")


def _find_processes(environment: Mapping[str, str]) -> tuple[str, _Processes]:
    """Return who names the processes, and address, number of processes and number of this one as far as it says."""
    address, *numbers = (environment.get(name) or None for name in VARIABLES)
    if all(numbers) and address:
        return "variables", (address, _read_int(environment, VARIABLES[1]), _read_int(environment, VARIABLES[2]))
    if any(numbers):
        missing = " and ".join(name for name in VARIABLES if not environment.get(name))
        message = (
            f"{missing} must be set too if {' or '.join(VARIABLES[1:])} is: all three name the processes of a run"
        )
        raise InputError(message, field="distributed", expected=", ".join(VARIABLES))
    if all(name in environment for name in OPEN_MPI):
        if not address and "OMPI_MCA_orte_hnp_uri" not in environment:
            message = (
                "Open MPI 5 does not say where process 0 runs: pass its host and a free port to all, "
                "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ..."
            )
            raise InputError(message, field="distributed", expected="JAX_COORDINATOR_ADDRESS")
        return "Open MPI", (address, _read_int(environment, OPEN_MPI[0]), _read_int(environment, OPEN_MPI[1]))
    if all(name in environment for name in SLURM):
        return "Slurm", (address, _read_int(environment, "SLURM_NTASKS"), _read_int(environment, "SLURM_PROCID"))
    return "JAX", (address, None, None)


def _divide_cards(node: _Node) -> tuple[tuple[int, ...], int | None]:
    """Return the cards to use among the visible ones, () for all, and how many this process was given."""
    shown = node.num_cards if node.visible is None else len(node.visible)
    if shown is None:  # no variable names cards: take card LOCALID, as JAX does
        return (node.local_id,) if node.num_tasks > 1 else (), None
    if shown > 1 and any(name.startswith("MIG-") for name in node.visible or ()):
        message = (
            f"CUDA shows a process one MIG slice only, but CUDA_VISIBLE_DEVICES has {shown}: start one task for each "
            "slice and show it that slice, with Slurm by --gpus-per-task=1"
        )
        raise InputError(message, field="CUDA_VISIBLE_DEVICES", given=shown, expected="one MIG slice")
    fair_share = (node.num_cards or 0) // node.num_tasks if node.is_scheduled else None
    if node.num_tasks == 1 or shown == 0:
        return (), (shown if fair_share is None else fair_share) or None
    is_own = shown < node.num_tasks if node.num_cards is None else shown * node.num_tasks <= node.num_cards
    if is_own:  # each task sees its own cards
        return (), shown if fair_share is None else fair_share
    sees_all = not node.is_scheduled or shown >= (node.num_cards or 0)
    if not sees_all or shown % node.num_tasks:
        message = (
            f"the {node.num_tasks} tasks of this node cannot share its {_count(node.num_cards or shown, 'card')}, of "
            f"which each sees {shown}: start a number of tasks that divides the cards, without --gpu-bind, or name "
            "those of each task in JAX_LOCAL_DEVICE_IDS"
        )
        raise InputError(message, field="devices", given=shown, expected="a share of its own for each task")
    share = shown // node.num_tasks
    return tuple(range(node.local_id * share, (node.local_id + 1) * share)), share


def _find_node(environment: Mapping[str, str], num_cards: int | None) -> _Node:
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    visible = None if shown is None else _parse_visible(shown)
    on_node = _read_int(environment, "SLURM_GPUS_ON_NODE", 0) or None
    if all(name in environment for name in OPEN_MPI):
        num_tasks, local_id = (_read_int(environment, name) for name in OPEN_MPI[2:])
        return _Node(num_tasks, local_id, on_node or num_cards, on_node is not None, visible)
    if all(name in environment for name in SLURM):
        num_tasks, local_id = _count_slurm_tasks(environment), _read_int(environment, "SLURM_LOCALID")
        return _Node(num_tasks, local_id, on_node, on_node is not None, visible)
    return _Node(1, 0, num_cards, False, visible)  # the machine or container is this process's own


def _count_slurm_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of this step on this node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if not text:
        num_nodes = _read_int(environment, "SLURM_STEP_NUM_NODES", 1)
        return -(-_read_int(environment, "SLURM_NTASKS") // num_nodes)
    counts: list[int] = []
    for part in text.split(","):  # such as 2(x3),1: two tasks on each of three nodes, one on the fourth
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            message = f"SLURM_STEP_TASKS_PER_NODE must be a list of numbers such as 2(x3),1, got {text}"
            raise InputError(message, field="SLURM_STEP_TASKS_PER_NODE", given=text, expected="numbers")
        counts += [int(match[1])] * int(match[2] or 1)
    index = _read_int(environment, "SLURM_NODEID", 0)
    return counts[index] if index < len(counts) else counts[-1]


def _parse_visible(text: str) -> tuple[str, ...]:
    """Return the entries that CUDA heeds: numbers and UUIDs up to the first that names no device."""
    entries: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry):
            break
        entries.append(entry)
    return tuple(entries)


def _parse_device_ids(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        message = f"JAX_LOCAL_DEVICE_IDS must be numbers of cards such as 0,1, got {text}"
        raise InputError(message, field="JAX_LOCAL_DEVICE_IDS", given=text, expected="numbers such as 0,1")
    return tuple(map(int, parts))


def _read_int(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        message = f"{name} must be a whole number, got {text or 'nothing'}"
        raise InputError(message, field=name, given=text, expected="a whole number")
    return int(text)


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
