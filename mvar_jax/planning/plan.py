"""Plans of a config: as it is, with other settings of memory, and beside VAR."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import devices_of
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.planning.advice import first_change
from mvar_jax.planning.figures import measure
from mvar_jax.planning.report import Plan, show_bytes, show_time, table
from mvar_jax.planning.roofline import estimate, machine_for
from mvar_jax.planning.tasks import make_task, programs_of
from mvar_jax.sharding import mesh_shapes
from mvar_jax.training.programs import PARTS, TRAIN

MAX_TENSOR = 4  # of the meshes that a search tries
TRIED_PARTS = (1, 2, 4, 8, 16)


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
    """Return the plan of a config. num_largest: compile only so many training steps, those with most tokens."""
    task = make_task(config, devices_of(request.target), request.num_images, request.tokenizer)
    programs = [one for one in programs_of(task, request.num_samples) if one.part in request.parts]
    if num_largest is not None:
        programs = sorted(programs, key=lambda one: -one.flops)[:num_largest]
    figures = measure(task, programs, request.target, config, request.folder)
    machine = machine_for(request.target)
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


@dataclasses.dataclass(frozen=True)
class Try:
    """A setting that a search tried. images_per_s: of its largest step, 0 if it does not fit."""

    changes: dict
    plan: Plan
    images_per_s: float


def search(config: dict, request: Request, limit_s: float) -> list[Try]:
    """Return what was tried, the fastest that fits first.

    Meshes, rematerialisation and micro-batches are tried from the config's own on, nearest first, until the time is
    up. A try is judged by its training step with most products alone.
    """
    begin, longest_s, tries = time.monotonic(), 0.0, []
    request = dataclasses.replace(request, parts=(TRAIN,))
    for changes in _candidates(config, len(devices_of(request.target))):
        if tries and changes.get("mesh") == tries[0].plan.mesh:
            continue  # the config's own
        begin_s = time.monotonic()
        if tries and begin_s - begin + longest_s > limit_s:
            break
        try:
            plan = make_plan(_changed(config, changes), request, num_largest=1)
        except InputError as error:
            if not tries:
                raise
            print(f"plan: {_words(changes)} is not allowed: {error}", file=sys.stderr, flush=True)
            continue
        longest_s = max(longest_s, time.monotonic() - begin_s)
        (step,) = plan.figures
        seconds = estimate(step, plan.machine).total_s
        rate = step.images / seconds if seconds and plan.is_fitting else 0.0
        tries.append(Try(changes, plan, rate))
    return sorted(tries, key=lambda one: -one.images_per_s)


def _candidates(config: dict, num_devices: int) -> Iterator[dict]:
    """Yield changes of a config, those of few keys first; none first of all."""
    model = config["model"]
    remats = (False, True) if config["task"] == "tokenizer" else ("none", "dots", "full")
    own = model.get("remat", remats[0])
    meshes = [None, *mesh_shapes(num_devices, MAX_TENSOR)]
    parts = [None, *(num for num in TRIED_PARTS if num != config.get("accumulate_steps", 1))]
    choices = itertools.product(meshes, [None, *(one for one in remats if one != own)], parts)
    for mesh, remat, num in sorted(choices, key=lambda choice: sum(one is not None for one in choice)):
        yield {
            name: value
            for name, value in (("mesh", mesh), ("remat", remat), ("accumulate_steps", num))
            if value is not None
        }


def _changed(config: dict, changes: dict) -> dict:
    config = dict(config)
    if "remat" in changes:
        config["model"] = config["model"] | {"remat": changes["remat"]}
    return config | {name: value for name, value in changes.items() if name != "remat"}


def _words(changes: dict) -> str:
    """Return changes as options of the command line."""
    found = []
    for name, value in changes.items():
        if name == "mesh":
            found += [f"--config.mesh.{axis}={size}" for axis, size in value.items()]
        else:
            found.append(f"--config.{'model.' if name == 'remat' else ''}{name}={value}")
    return " ".join(found) or "the config as it is"


def describe_tries(tries: list[Try]) -> str:
    """Return a search's table, and its best."""
    rows = [("setting", "peak", "step", "images/s", "")]
    for one in tries:
        (step,) = one.plan.figures
        time_s = estimate(step, one.plan.machine).total_s
        times = ("", "") if step.is_refused else (show_time(time_s), f"{step.images / time_s:,.0f}" if time_s else "")
        rows.append(
            (_words(one.changes), show_bytes(step.peak_bytes), *times, "fits" if one.images_per_s else "does not fit")
        )
    best = tries[0] if tries and tries[0].images_per_s else None
    found = f"best of {len(tries)}: {_words(best.changes)}" if best else f"none of {len(tries)} fits"
    return "\n".join([*table(rows), found])
