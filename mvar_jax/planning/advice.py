"""Whether programs fit a machine, and the first change of a config that would make them fit, by arithmetic."""

import dataclasses
import math
from collections.abc import Iterator

from mvar_jax.errors import InputError
from mvar_jax.hardware.machines import Machine
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.planning.figures import Figures
from mvar_jax.sharding import check_batch_size, check_sizes, num_shards_of, wider_meshes
from mvar_jax.training.programs import TRAIN
from mvar_jax.training.task import DataTask

MAX_PARTS = 64
# widths of a token in a block that remat "dots" keeps and "full" does not: q, k, v, two outputs, hidden of 4 widths
KEPT_WIDTHS = 9
RESERVED_SHARE = 0.95  # of a GPU that JAX may be told to reserve


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a run and the bytes that it is predicted to save on each device."""

    words: str
    saved_bytes: float


def largest_of(figures: list[Figures]) -> Figures:
    """Return the program that needs most memory."""
    return max(figures, key=lambda one: one.peak_bytes)


def first_change(task: DataTask, figures: list[Figures], machine: Machine) -> Change | None:
    """Return the first change after which the training steps are predicted to fit, None if no single one does.

    In order: micro-batches (no more work), rematerialisation (more products), fsdp (more communication), and what
    JAX reserves of a GPU.
    """
    steps = [one for one in figures if one.part == TRAIN]
    largest = largest_of(steps or figures)
    excess = largest.peak_bytes - machine.usable_bytes
    changes = _changes(task, largest, machine) if steps and largest.peak_bytes > machine.usable_bytes else iter(())
    return next((change for change in changes if change.saved_bytes >= excess), None)


def _changes(task: DataTask, largest: Figures, machine: Machine) -> Iterator[Change]:
    run = task.run
    # gradients have the size of the parameters, and the parts' sum takes as much again
    activations = max(0.0, largest.activation_bytes - largest.params_bytes)
    sums = largest.params_bytes if run.accumulate_steps == 1 else 0
    for factor in (2**i for i in range(1, int(math.log2(MAX_PARTS)) + 1)):
        parts = factor * run.accumulate_steps
        if _is_accepted(check_batch_size, run.batch_size, run.mesh, parts):
            yield Change(f"config.accumulate_steps={parts}", activations * (1 - 1 / factor) - sums)
    yield from _rematerialisation(task, largest)
    for mesh in wider_meshes(run.mesh):
        if _is_accepted(check_sizes, task.module.mesh_sizes(), mesh):
            factor = num_shards_of("width", mesh) / num_shards_of("width", run.mesh)
            state = 2 * largest.params_bytes + largest.optimizer_bytes  # with the gradients
            words = " ".join(f"config.mesh.{name}={size}" for name, size in mesh.shape.items())
            yield Change(words, state * (1 - 1 / factor))
    if machine.platform == "gpu":
        words = f"XLA_PYTHON_CLIENT_MEM_FRACTION={RESERVED_SHARE} in the environment"
        yield Change(words, RESERVED_SHARE * machine.memory_bytes - machine.usable_bytes)


def _rematerialisation(task: DataTask, largest: Figures) -> Iterator[Change]:
    module, run = task.module, task.run
    if isinstance(module, Tokenizer):
        if not module.remat:  # measured at 256 px: 0.45 of the activations stay
            yield Change("config.model.remat=True", 0.55 * largest.activation_bytes)
        return
    if getattr(module, "remat", "full") == "full":
        return
    rows = run.batch_size / num_shards_of("batch", run.mesh) / run.accumulate_steps
    num_tokens = max(phase.num_tokens for phase in task.phases)  # type: ignore[attr-defined]  # of a TokenTask
    kept = rows * num_tokens * KEPT_WIDTHS * module.width * module.depth * module.dtype(0).dtype.itemsize
    yield Change("config.model.remat=full", kept / num_shards_of("heads", run.mesh))


def _is_accepted(check, *arguments) -> bool:
    try:
        check(*arguments)
    except InputError:
        return False
    return True
