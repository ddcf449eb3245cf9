"""The processes and cards that a cluster's variables name, and what JAX makes of them."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mvar_jax.errors import InputError
from mvar_jax.processes.cluster import Place, check_devices, count_cards, describe, find_place


def slurm(tasks: str, local_id: int, *, process_id: int | None = None, node: int = 0, **more: str) -> dict[str, str]:
    """The variables that srun and slurmstepd set for one task. `tasks` is SLURM_STEP_TASKS_PER_NODE."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "node[01-04]",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": str(local_id if process_id is None else process_id),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local_id),
    } | more


def cards(on_node: int, visible: str) -> dict[str, str]:
    return {"SLURM_GPUS_ON_NODE": str(on_node), "CUDA_VISIBLE_DEVICES": visible}


def open_mpi(size: int, local_size: int, local_rank: int, **more: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    } | more


EIGHT = "0,1,2,3,4,5,6,7"
UUIDS = ",".join(f"GPU-{i}0c0ffee-0000-0000-0000-000000000000" for i in range(8))
PODS = {"JAX_COORDINATOR_ADDRESS": "mvar-train-0-0.mvar:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}

# variables of one process, cards of its machine -> numbers of the cards to use (() for all visible ones), cards given
TABLE = {
    # sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8; srun PROGRAM
    "one task a node": (slurm("1(x4)", 0, process_id=2, node=2, **cards(8, EIGHT)), None, (), 8),
    # sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8; srun PROGRAM
    "one task a card, all visible": (slurm("8", 5, **cards(8, EIGHT)), None, (5,), 1),
    # the same with AutoDetect=nvml and Flags=nvidia_gpu_env_uuid in gres.conf
    "one task a card, all visible by UUID": (slurm("8", 5, **cards(8, UUIDS)), None, (5,), 1),
    # srun --ntasks-per-node=8 --gpus-per-task=1 PROGRAM, with ConstrainDevices: each sees its own as number 0
    "one task a card, own visible": (slurm("8", 5, **cards(8, "0")), None, (), 1),
    # the same without ConstrainDevices: the card's number on the node
    "one task a card, own visible by its number": (slurm("8", 5, **cards(8, "5")), None, (), 1),
    # srun --ntasks-per-node=2 --gpus-per-node=8 PROGRAM
    "two tasks, eight cards, all visible": (slurm("2", 1, **cards(8, EIGHT)), None, (4, 5, 6, 7), 4),
    # srun --ntasks-per-node=2 --gpus-per-task=4 PROGRAM
    "two tasks, four cards each, own visible": (slurm("2", 1, **cards(8, "4,5,6,7")), None, (), 4),
    # sbatch --nodes=4 --ntasks=7 --gpus-per-node=2: the last node has one task, which gets both cards
    "uneven tasks": (slurm("2(x3),1", 0, process_id=6, node=3, **cards(2, "0,1")), None, (), 2),
    "uneven tasks, a full node": (slurm("2(x3),1", 1, process_id=3, node=1, **cards(2, "0,1")), None, (1,), 1),
    # srun --ntasks-per-node=8 --gpus-per-node=8 env -u CUDA_VISIBLE_DEVICES PROGRAM
    "Slurm counts the cards, CUDA is not restricted": (slurm("8", 5, SLURM_GPUS_ON_NODE="8"), None, (5,), 1),
    # srun --ntasks-per-node=8 PROGRAM on a cluster whose nodes have cards that Slurm does not know
    "Slurm knows of no cards": (slurm("8", 5), 8, (5,), None),
    # srun --ntasks-per-node=1 PROGRAM there
    "Slurm knows of no cards, one task": (slurm("1(x4)", 0), 8, (), None),
    # srun --gres=none PROGRAM, as older versions of Slurm tell it
    "a task without cards": (slurm("1", 0, CUDA_VISIBLE_DEVICES="NoDevFiles"), None, (), None),
    # srun --gpus-per-node=8 PROGRAM, in a container that lost the devices
    "cards given and none visible": (slurm("1", 0, **cards(8, "")), None, (), 8),
    "cards given and none visible, by task": (slurm("8", 5, **cards(8, "NoDevFiles")), None, (), 1),
    # srun --gpus-per-node=8 --gpu-bind=single:1 PROGRAM, one task: seven cards would lie idle
    "one task bound to one of eight": (slurm("1", 0, **cards(8, "0")), None, (), 8),
    # srun --ntasks-per-node=4 --gpus-per-node=8 --gpu-bind=single:1 PROGRAM: four would
    "four tasks bound to one of eight": (slurm("4", 3, **cards(8, "3")), None, (), 2),
    # srun --ntasks-per-node=7 --gpus-per-task=1 PROGRAM on a node cut into MIG slices
    "MIG slices, one a task": (slurm("7", 3, **cards(7, "MIG-3f22e5a1-0000-0000-0000-000000000000")), None, (), 1),
    # CUDA stops at the first entry that names no device
    "CUDA reads to the first bad entry": (slurm("1", 0, CUDA_VISIBLE_DEVICES="0,1,-1,2"), None, (), 2),
    # JAX_LOCAL_DEVICE_IDS=0,2 srun ...
    "JAX's own variable": (slurm("1", 0, JAX_LOCAL_DEVICE_IDS="0,2", **cards(8, EIGHT)), None, (0, 2), 2),
    # JAX_PLATFORMS=cpu srun ...
    "the CPU on purpose": (slurm("3", 2, JAX_PLATFORMS="cpu", **cards(8, EIGHT)), None, (), None),
    # Open MPI 4: mpirun -np 16 --map-by ppr:8:node PROGRAM
    "Open MPI, one process a card": (open_mpi(16, 8, 5), 8, (5,), 1),
    # mpirun -np 2 --map-by ppr:1:node PROGRAM
    "Open MPI, one process a node": (open_mpi(2, 1, 0), 8, (), 8),
    # mpirun -np 4 --map-by ppr:2:node PROGRAM
    "Open MPI, two processes a node": (open_mpi(4, 2, 1), 8, (4, 5, 6, 7), 4),
    # mpirun -np 16 sh -c 'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec PROGRAM'
    "Open MPI, own card visible": (open_mpi(16, 8, 5, CUDA_VISIBLE_DEVICES="5"), 8, (), 1),
    # CUDA_VISIBLE_DEVICES=0,1 mpirun -x CUDA_VISIBLE_DEVICES -np 2 PROGRAM on a machine with two cards
    "Open MPI, all visible": (open_mpi(2, 2, 1, CUDA_VISIBLE_DEVICES="0,1"), 2, (1,), 1),
    # sbatch --nodes=2 --gpus-per-node=4; mpirun PROGRAM, whose script's own task number is 0 in every process
    "Open MPI below Slurm": (slurm("4(x2)", 0, **cards(4, "0,1,2,3")) | open_mpi(8, 4, 3), 8, (3,), 1),
    "Open MPI on CPUs": (open_mpi(4, 2, 1), None, (1,), None),
    # launch/k8s/jobset.yaml: the container has the node's cards and nobody sets CUDA_VISIBLE_DEVICES
    "a pod": (PODS | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 8, (), 8),
    # CUDA_VISIBLE_DEVICES=0,1 PROGRAM --distributed auto on a machine with eight cards
    "a user's choice of cards": (PODS | {"CUDA_VISIBLE_DEVICES": "0,1"}, 8, (), 2),
    # a TPU VM: JAX asks its metadata server
    "a TPU VM": ({}, None, (), None),
    # launch/k8s/jobset_tpu.yaml: GKE sets these and JAX reads them
    "a TPU pod": ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, None, (), None),
}


@pytest.mark.parametrize("name", TABLE)
def test_process_uses_the_cards_that_are_its_own_and_no_others(name):
    environment, num_cards, ids, num_devices = TABLE[name]
    place = find_place(environment, num_cards=num_cards)
    assert (place.local_device_ids, place.num_devices) == (ids, num_devices)


@pytest.mark.parametrize(("num_tasks", "num_cards"), [(1, 8), (2, 8), (4, 8), (8, 8), (2, 2), (3, 6), (1, 1)])
@pytest.mark.parametrize("is_bound", [False, True], ids=["all visible", "own visible"])
def test_tasks_of_a_node_use_every_card_once(num_tasks, num_cards, is_bound):
    used, share = [], num_cards // num_tasks
    for local_id in range(num_tasks):
        own = list(range(num_cards))[local_id * share : (local_id + 1) * share]
        visible = own if is_bound else list(range(num_cards))
        environment = slurm(str(num_tasks), local_id, **cards(num_cards, ",".join(map(str, visible))))
        place = find_place(environment)
        used += [visible[index] for index in place.local_device_ids] or visible
        assert place.num_devices == share
    assert used == list(range(num_cards))


PROCESSES = {
    "option": (PODS, ("a:1", 3, 2), ("option", "a:1", 3, 2)),
    "variables": (slurm("8", 5) | PODS, None, ("variables", "mvar-train-0-0.mvar:1234", 2, 1)),
    "Slurm": (slurm("2(x4)", 1, process_id=7), None, ("Slurm", None, 8, 7)),
    # JAX_COORDINATOR_ADDRESS=node01:1234 srun ..., if the network that JAX would choose is not the one to use
    "Slurm with an address": (slurm("8", 5) | {"JAX_COORDINATOR_ADDRESS": "a:1"}, None, ("Slurm", "a:1", 8, 5)),
    "Open MPI 4": (open_mpi(16, 8, 5), None, ("Open MPI", None, 16, 5)),
    "JAX": ({}, None, ("JAX", None, None, None)),
    # an interactive shell of salloc: no step, so no process
    "allocation without a step": ({"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "8"}, None, ("JAX", None, None, None)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_process_has_its_number_among_those_of_the_run(name):
    environment, given, expected = PROCESSES[name]
    place = find_place(environment, given)
    assert (place.how, place.coordinator_address, place.num_processes, place.process_id) == expected


def test_option_keeps_the_cards_that_slurm_gave_the_task():
    place = find_place(slurm("8", 5, **cards(8, EIGHT)), ("a:1", 8, 5))
    assert place.arguments == {
        "coordinator_address": "a:1",
        "num_processes": 8,
        "process_id": 5,
        "local_device_ids": [5],
    }


OPEN_MPI_5 = {key: value for key, value in open_mpi(16, 8, 5).items() if key != "OMPI_MCA_orte_hnp_uri"}
MIG = ",".join(f"MIG-{i}f22e5a1-0000-0000-0000-000000000000" for i in range(7))
REFUSED = {
    "cards that the tasks do not divide": (slurm("3", 2, **cards(8, EIGHT)), "devices", "cannot share its 8 cards"),
    # srun --ntasks-per-gpu=2
    "two tasks for one card": (slurm("2", 1, **cards(1, "0")), "devices", "cannot share its 1 card, of"),
    # srun --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=closest on two sockets
    "cards of a socket shared by its tasks": (slurm("8", 5, **cards(8, "4,5,6,7")), "devices", "without --gpu-bind"),
    "several MIG slices": (slurm("1", 0, **cards(7, MIG)), "CUDA_VISIBLE_DEVICES", "one MIG slice only.*has 7"),
    "Open MPI 5 without an address": (OPEN_MPI_5, "distributed", "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    "half of the variables": ({"JAX_PROCESS_ID": "0"}, "distributed", "^JAX_COORDINATOR_ADDRESS and JAX_NUM_PROC"),
    "device ids": ({"JAX_LOCAL_DEVICE_IDS": "0,x"}, "JAX_LOCAL_DEVICE_IDS", "numbers of cards such as 0,1, got 0,x"),
    "a number": (slurm("8", 5) | {"SLURM_PROCID": "x"}, "SLURM_PROCID", "must be a whole number, got x"),
    "tasks": (slurm("2(3)", 1), "SLURM_STEP_TASKS_PER_NODE", "got 2\\(3\\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variables_that_cannot_be_meant_are_refused(name):
    environment, field, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as caught:
        find_place(environment)
    assert caught.value.field == field


def test_open_mpi_5_joins_at_the_given_address():
    place = find_place(OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "a:1"})
    assert (place.coordinator_address, place.num_processes, place.process_id) == ("a:1", 16, 5)


@pytest.mark.parametrize(
    ("given", "seen", "platform", "words"),
    [
        (8, 1, "gpu", "sees 1 of the 8 cards that it was given.*JAX_LOCAL_DEVICE_IDS"),
        (8, 8, "cpu", r"was given 8 cards, but jax sees none.*jax\[cuda12\].*JAX_PLATFORMS=cpu"),
        (1, 1, "cpu", "was given 1 card, but jax sees none"),
    ],
)
def test_process_that_would_leave_cards_idle_refuses(given, seen, platform, words):
    with pytest.raises(InputError, match=words) as caught:
        check_devices(Place("Slurm", num_devices=given), seen, platform)
    assert caught.value.field == "devices" and "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "seen", "platform"), [(8, 8, "gpu"), (4, 8, "tpu"), (None, 1, "cpu")])
def test_process_that_sees_its_cards_is_content(given, seen, platform):
    check_devices(Place("Slurm", num_devices=given), seen, platform)


def test_cards_are_counted_by_their_device_files(tmp_path):
    assert count_cards(tmp_path) is None
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert count_cards(tmp_path) == 3


@pytest.mark.parametrize(
    ("counts", "mesh", "line"),
    [
        ((8, 8), {"data": 16, "fsdp": 1, "tensor": 1}, "2 processes x 8 devices (NVIDIA H100), mesh data=16"),
        ((4,), {"data": 2, "fsdp": 2}, "1 process x 4 devices (NVIDIA H100), mesh data=2 fsdp=2"),
        ((1,), {"data": 1}, "1 process x 1 device (NVIDIA H100)"),
        ((8, 4), {"data": 12}, "2 processes with 8, 4 devices (NVIDIA H100), mesh data=12"),
    ],
)
def test_first_line_says_processes_devices_and_mesh(counts, mesh, line):
    owners = itertools.chain(*([index] * count for index, count in enumerate(counts)))
    devices = [SimpleNamespace(process_index=index, device_kind="NVIDIA H100") for index in owners]
    assert describe(devices, mesh) == line


# what jax.distributed.initialize makes of a place, up to the connection, which there is nobody for
INITIALIZE = """
import json, os, sys
import jax
from jax._src import distributed, xla_bridge
from mvar_jax.processes.cluster import find_place

class Service:
    connect = shutdown = lambda self: None

made = {}
def make_client(address, process_id, **more):
    made.update(address=address, process_id=process_id)
    return Service()

distributed._jax.get_distributed_runtime_service = lambda *args, **more: Service()
distributed._jax.get_distributed_runtime_client = make_client
distributed.State.initialize_preemption_sync_manager = lambda self: None
results = []
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    distributed.global_state = distributed.State()
    jax.config.update("jax_cuda_visible_devices", "all")
    jax.distributed.initialize(**find_place({**os.environ, "JAX_PLATFORMS": ""}).arguments)
    cards = xla_bridge.CUDA_VISIBLE_DEVICES.value
    results.append(made | {"cards": cards, "num": distributed.global_state.num_processes})
    for name in environment:
        del os.environ[name]
print(json.dumps(results))
"""


def test_jax_joins_as_the_place_says():
    """The real `initialize` of the installed jax: its own choice of a card must not come back."""
    environments = [
        slurm("1(x8)", 0, process_id=3, node=3, **cards(8, EIGHT)),
        slurm("8", 5, **cards(8, EIGHT)),
        slurm("8", 5, **cards(8, "0")),
        open_mpi(16, 8, 5, CUDA_VISIBLE_DEVICES="5"),
        PODS,
    ]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "JAX_"))}
    result = subprocess.run(
        [sys.executable, "-c", INITIALIZE, json.dumps(environments)],
        env=own | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    port = 4242 % 2**12 + 65535 - 2**12 + 1
    assert json.loads(result.stdout) == [
        {"address": f"node01:{port}", "process_id": 3, "num": 8, "cards": "all"},
        {"address": f"node01:{port}", "process_id": 5, "num": 8, "cards": "5"},
        {"address": f"node01:{port}", "process_id": 5, "num": 8, "cards": "all"},
        {"address": "10.96.0.1:" + str(1531576320 // 2**12 % 2**12 + 65535 - 2**12 + 1)}
        | {"process_id": 5, "num": 16, "cards": "all"},
        {"address": "mvar-train-0-0.mvar:1234", "process_id": 1, "num": 2, "cards": "all"},
    ]
