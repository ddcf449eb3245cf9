"""The plan of a config on a target: its programs, compiled, with their figures."""

import dataclasses
from pathlib import Path

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import devices_of
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.planning.advice import first_change
from mvar_jax.planning.calibration import machine_for
from mvar_jax.planning.figures import measure
from mvar_jax.planning.report import Plan
from mvar_jax.planning.tasks import make_task, programs_of
from mvar_jax.training.programs import PARTS


@dataclasses.dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
      name: of the config, as the report calls it.
      target: the machines, see `compiling.devices_of`.
      parts: some of train, sample and cache.
      num_samples: images that the sampler draws at once.
      num_images: of the training split, None if it is known or not needed.
      tokenizer: of a transformer's run, None for that of the data or the published one.
      folder: keeps figures between calls, None keeps none.
    """

    name: str
    target: str
    parts: tuple[str, ...] = PARTS
    num_samples: int = 32
    num_images: int | None = None
    tokenizer: Tokenizer | None = None
    folder: Path | None = None


def make_plan(config: dict, request: Request, num_largest: int | None = None) -> Plan:
    """Return the plan of a config.

    num_largest: compile only so many training steps, those with most products.

    Raises InputError if the config does not fit the target, or has none of the parts.
    """
    machine = machine_for(request.target)
    task = make_task(config, devices_of(request.target), request.num_images, request.tokenizer)
    whole = programs_of(task, request.num_samples)
    programs = [one for one in whole if one.part in request.parts]
    if not programs:
        expected = f"some of {', '.join(dict.fromkeys(one.part for one in whole))}, the programs of {request.name}"
        given = ",".join(request.parts)
        raise InputError(f"--parts must be {expected}, got {given}", field="parts", given=given, expected=expected)
    if num_largest is not None:
        programs = sorted(programs, key=lambda one: -one.flops)[:num_largest]
    figures = measure(task, programs, request.target, config, request.folder)
    return Plan(
        config=request.name,
        target=request.target,
        machine=machine,
        mesh=dict(task.run.mesh.shape),
        batch_size=task.run.batch_size,
        num_steps=task.run.num_steps,
        figures=tuple(figures),
        whole=tuple(task.whole_dimensions()),
        change=first_change(task, figures, machine),
    )
