"""The fastest mesh, rematerialisation, loop over blocks and micro-batches of a config that fit its machines."""

import dataclasses
import itertools
import math
import threading
import time
from typing import Any

from mvar_jax.errors import InputError
from mvar_jax.hardware.machines import platform_of
from mvar_jax.planning.figures import Figures, run_together, say
from mvar_jax.planning.plan import Request, make_plan
from mvar_jax.planning.report import Plan, show_bytes, show_time, table, to_json
from mvar_jax.planning.roofline import estimate
from mvar_jax.sharding import mesh_shapes
from mvar_jax.training.programs import TRAIN

MAX_TENSOR = 4  # of the meshes that are tried
TRIED_PARTS = (1, 2, 4, 8, 16)
MODEL_KEYS = ("remat", "scan_unroll")


@dataclasses.dataclass(frozen=True)
class Try:
    """A setting that was tried.

    Attributes:
      changes: of the config.
      plan: of its training steps; only the one with most products is compiled, of the best try all are.
      step: that one.
      images_per_s: of the step, 0 if it does not fit.
    """

    changes: dict
    plan: Plan
    step: Figures
    images_per_s: float


def search(config: dict, request: Request, limit_s: float) -> list[Try]:
    """Return what was tried, the fastest that fits first.

    Tries meshes, rematerialisation, on a GPU a transformer without a loop over its blocks, and micro-batches, the
    settings nearest to the config's own first. No try begins
    if one as long as the longest so far would end after `limit_s` seconds. A try is judged by the training step with
    most products; the other steps of the best are compiled at the end, which may take longer than the limit.
    """
    begin_s = time.monotonic()
    request = dataclasses.replace(request, parts=(TRAIN,))
    tries = [_try(config, request, {})]  # its errors are the caller's
    longest_s = time.monotonic() - begin_s
    candidates = _candidates(config, tries[0].plan.mesh, platform_of(request.target))
    lock = threading.Lock()

    def try_others() -> None:
        nonlocal longest_s
        while True:
            with lock:
                spent_s = time.monotonic() - begin_s
                if spent_s + longest_s > limit_s or not candidates:
                    return
                changes = candidates.pop(0)
            say(f"trying {words_of(changes)}, {spent_s:.0f} of {limit_s:.0f} s")
            try_begin_s = time.monotonic()
            try:
                found = _try(config, request, changes)
            except InputError as error:
                say(f"{words_of(changes)} is not allowed: {error}")
                continue
            with lock:
                longest_s = max(longest_s, time.monotonic() - try_begin_s)
                tries.append(found)

    run_together(try_others, candidates.clear)
    return _check_best(config, request, tries)


def _check_best(config: dict, request: Request, tries: list[Try]) -> list[Try]:
    """Return the tries, the best first, whose whole training fits if any does."""
    best_first = lambda: sorted(tries, key=lambda one: (-one.images_per_s, len(one.changes)))
    for _ in range(len(tries)):
        best, *others = tries = best_first()
        if not best.images_per_s or best.plan.run_s is not None:
            break
        plan = make_plan(_changed(config, best.changes), request)
        if plan.is_fitting:
            return [dataclasses.replace(best, plan=plan), *others]
        tries = [dataclasses.replace(best, plan=plan, images_per_s=0.0), *others]
    return best_first()


def _try(config: dict, request: Request, changes: dict) -> Try:
    plan = make_plan(_changed(config, changes), request, num_largest=1)
    (step,) = plan.figures
    seconds = estimate(step, plan.machine).total_s
    return Try(changes, plan, step, step.images / seconds if seconds and plan.is_fitting else 0.0)


def _candidates(config: dict, mesh: dict[str, int], platform: str) -> list[dict]:
    """Return changes of a config whose mesh is `mesh`, nearest first: each doubling of an axis or part is a step."""
    model = config["model"]
    remats = (False, True) if config["task"] == "tokenizer" else ("none", "dots", "full")
    own = {
        "mesh": mesh,
        "remat": model.get("remat", remats[0]),
        "scan_unroll": model.get("scan_unroll", 1),
        "accumulate_steps": config.get("accumulate_steps", 1),
    }
    # on a TPU a loop costs nothing: it reads and writes stacked arrays in place
    is_gpu_transformer = config["task"] == "transformer" and platform == "gpu"
    tried = {
        "mesh": sorted(
            mesh_shapes(math.prod(mesh.values()), MAX_TENSOR), key=lambda shape: _steps_between(mesh, shape)
        ),
        "remat": remats,
        "scan_unroll": sorted({own["scan_unroll"], *((1, model["depth"]) if is_gpu_transformer else ())}),
        "accumulate_steps": sorted({own["accumulate_steps"], *TRIED_PARTS}),
    }

    def distance(choice: dict) -> float:
        remat_steps = abs(remats.index(choice["remat"]) - remats.index(own["remat"]))
        part_steps = abs(math.log2(choice["accumulate_steps"] / own["accumulate_steps"]))
        loop_steps = choice["scan_unroll"] != own["scan_unroll"]
        return _steps_between(mesh, choice["mesh"]) + remat_steps + loop_steps + part_steps

    choices = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
    found = [{key: x for key, x in choice.items() if x != own[key]} for choice in sorted(choices, key=distance)]
    return found[1:]  # the first is the config's own


def _steps_between(one: dict[str, int], other: dict[str, int]) -> float:
    """Return the doublings of the axes that split the state; what shares the batch follows from them."""
    pairs = list(zip(one.values(), other.values(), strict=True))[1:]
    return sum(abs(math.log2(a / b)) for a, b in pairs)


def _changed(config: dict, changes: dict) -> dict:
    of_model = {key: value for key, value in changes.items() if key in MODEL_KEYS}
    others = {key: value for key, value in changes.items() if key not in MODEL_KEYS}
    return config | {"model": config["model"] | of_model} | others


def words_of(changes: dict) -> str:
    """Return changes as options of the command line."""
    found = []
    for name, value in changes.items():
        if name == "mesh":
            found += [f"--config.mesh.{axis}={size}" for axis, size in value.items()]
        else:
            found.append(f"--config.{'model.' if name in MODEL_KEYS else ''}{name}={value}")
    return " ".join(found) or "the config as it is"


def describe_tries(tries: list[Try]) -> str:
    """Return a search's table, and its best."""
    rows = [("setting", "peak", "step", "images/s", "")]
    for one in tries:
        step = one.step
        time_s = estimate(step, one.plan.machine).total_s
        times = ("", "") if step.is_refused else (show_time(time_s), f"{step.images / time_s:,.0f}" if time_s else "")
        verdict = "fits" if one.images_per_s else "does not fit"
        rows.append((words_of(one.changes), show_bytes(step.peak_bytes), *times, verdict))
    best = tries[0] if tries and tries[0].images_per_s else None
    found = f"best of {len(tries)}: {words_of(best.changes)}" if best else f"none of {len(tries)} fits"
    return "\n".join([*table(rows), found])


def tries_to_json(tries: list[Try]) -> dict[str, Any]:
    """Return the best try's report, and all tries, as JSON values."""
    rows = []
    for one in tries:
        seconds = None if one.step.is_refused else estimate(one.step, one.plan.machine).total_s
        values = {"options": words_of(one.changes), "step": one.step.name, "peak_bytes": one.step.peak_bytes}
        rows.append(values | {"seconds": seconds, "images_per_s": one.images_per_s or None})
    return to_json(tries[0].plan) | {"tries": rows}
