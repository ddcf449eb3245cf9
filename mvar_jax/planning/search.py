"""The fastest mesh, rematerialisation and number of micro-batches of a config that fit its machines."""

import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import devices_of
from mvar_jax.planning.figures import NUM_TOGETHER
from mvar_jax.planning.plan import Request, make_plan
from mvar_jax.planning.report import Plan, show_bytes, show_time, table
from mvar_jax.planning.roofline import estimate
from mvar_jax.sharding import mesh_shapes
from mvar_jax.training.programs import TRAIN

MAX_TENSOR = 4  # of the meshes that are tried
TRIED_PARTS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Try:
    """A setting that was tried. images_per_s: of its largest step, 0 if it does not fit."""

    changes: dict
    plan: Plan
    images_per_s: float


def search(config: dict, request: Request, limit_s: float) -> list[Try]:
    """Return what was tried, the fastest that fits first.

    Meshes, rematerialisation and micro-batches are tried from the config's own on, nearest first, until the time is
    up: none is begun that would end later if it takes as long as the longest before it. A try is judged by its
    training step with most products alone.
    """
    begin_s = time.monotonic()
    request = dataclasses.replace(request, parts=(TRAIN,))
    candidates = _candidates(config, len(devices_of(request.target)))
    tries = [_try(config, request, next(candidates))]  # the config's own: its errors are the caller's
    longest_s = time.monotonic() - begin_s
    lock = threading.Lock()

    def try_others() -> None:
        nonlocal longest_s
        while True:
            with lock:
                spent_s = time.monotonic() - begin_s
                changes = next(candidates, None)
                if changes is None or spent_s + longest_s > limit_s:
                    return
            if changes.get("mesh") == tries[0].plan.mesh:
                continue
            _say(f"trying {words_of(changes)}, {spent_s:.0f} of {limit_s:.0f} s")
            try_begin_s = time.monotonic()
            try:
                found = _try(config, request, changes)
            except InputError as error:
                _say(f"{words_of(changes)} is not allowed: {error}")
                continue
            with lock:
                longest_s = max(longest_s, time.monotonic() - try_begin_s)
                tries.append(found)

    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        try:
            for future in [pool.submit(try_others) for _ in range(NUM_TOGETHER)]:
                future.result()
        finally:
            limit_s = 0  # after an error or a signal nothing more is begun
    # of equal ones the config's own first, then the one with fewest changes
    return sorted(tries, key=lambda one: (-one.images_per_s, len(one.changes)))


def _say(words: str) -> None:
    print(f"plan: {words}", file=sys.stderr, flush=True)


def _try(config: dict, request: Request, changes: dict) -> Try:
    plan = make_plan(_changed(config, changes), request, num_largest=1)
    (step,) = plan.figures
    seconds = estimate(step, plan.machine).total_s
    return Try(changes, plan, step.images / seconds if seconds and plan.is_fitting else 0.0)


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


def words_of(changes: dict) -> str:
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
        verdict = "fits" if one.images_per_s else "does not fit"
        rows.append((words_of(one.changes), show_bytes(step.peak_bytes), *times, verdict))
    best = tries[0] if tries and tries[0].images_per_s else None
    found = f"best of {len(tries)}: {words_of(best.changes)}" if best else f"none of {len(tries)} fits"
    return "\n".join([*table(rows), found])
