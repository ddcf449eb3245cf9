"""The scale-Markov model beside VAR, the same weights with full conditioning, and beside published figures."""

import dataclasses
from typing import Any

from mvar_jax.errors import InputError
from mvar_jax.hardware.machines import Machine
from mvar_jax.planning.figures import Figures
from mvar_jax.planning.plan import Request, make_plan
from mvar_jax.planning.report import Plan, describe, show_bytes, show_time, table, to_json
from mvar_jax.planning.roofline import estimate
from mvar_jax.training.programs import SAMPLE, TRAIN

# (view, depth, what) -> peak MB that the paper prints for its PyTorch programs, batch 32
PUBLISHED_MB = {
    ("markov", 16, SAMPLE): 3846,
    ("full", 16, SAMPLE): 10882,
    ("markov", 20, SAMPLE): 5432,
    ("full", 20, SAMPLE): 16244,
    ("markov", 24, SAMPLE): 7216,
    ("full", 24, SAMPLE): 23056,
    ("markov", 16, TRAIN): 20676,
    ("full", 16, TRAIN): 34319,
    ("markov", 20, TRAIN): 27665,
    ("full", 20, TRAIN): 48173,
    ("markov", 24, TRAIN): 38579,
}
PUBLISHED_BATCH = 32
VIEWS = ("markov", "full")
# Settings of the published programs. The figures of sampling contain a float32 cache: 5440, 8500 and 12240 MiB are
# most of what VAR needs more. Training keeps every activation.
AS_PUBLISHED = {TRAIN: {"remat": "none"}, SAMPLE: {"dtype": "float32"}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One part of MVAR and VAR: peak bytes, mean seconds of a call (None: one was refused), published MB."""

    part: str
    batch: int
    peaks: tuple[int, int]
    seconds: tuple[float | None, float | None]
    published_mb: tuple[int | None, int | None]


def compare_views(config: dict, request: Request) -> tuple[Plan, Plan, list[Row]]:
    """Return (plan of MVAR, plan of VAR, rows). Raises InputError unless the config trains a transformer.

    A part has a row with the config's settings and, if those of the published programs are others, one with them.
    """
    if config["task"] != "transformer":
        words = f"--compare needs a config of a transformer, got config.task={config['task']}"
        raise InputError(words, field="config.task", given=config["task"], expected="transformer")
    markov, full = _plans_of(config, request)
    rows = []
    for part in (part for part in request.parts if part in AS_PUBLISHED):  # both encode alike
        changes = AS_PUBLISHED[part]
        is_same = changes.items() <= config["model"].items()
        rows.append(_row(part, part, config, (markov, full), is_same))
        if not is_same:
            plans = _plans_of(
                config | {"model": config["model"] | changes}, dataclasses.replace(request, parts=(part,))
            )
            words = " ".join(f"{name}={value}" for name, value in changes.items())
            rows.append(_row(f"{part}, {words}", part, config, plans, True))
    return markov, full, rows


def _plans_of(config: dict, request: Request) -> tuple[Plan, Plan]:
    """Return the plans of MVAR and VAR."""
    markov, full = (
        make_plan(config | {"model": config["model"] | {"conditioning": view}}, request) for view in VIEWS
    )
    return markov, full


def _row(name: str, part: str, config: dict, plans: tuple[Plan, Plan], is_published: bool) -> Row:
    own = [[one for one in plan.figures if one.part == part] for plan in plans]
    batch = own[0][0].images
    known = [PUBLISHED_MB.get((view, config["model"]["depth"], part)) for view in VIEWS]
    markov, full = known if is_published and batch == PUBLISHED_BATCH else (None, None)
    peaks = [max(one.peak_bytes for one in each) for each in own]
    seconds = [_seconds(each, plans[0].machine) for each in own]
    return Row(name, batch, (peaks[0], peaks[1]), (seconds[0], seconds[1]), (markov, full))


def _seconds(figures: list[Figures], machine: Machine) -> float | None:
    """Return the mean seconds of a call, of the steps by how often they run; None if one was refused."""
    if any(one.is_refused for one in figures):
        return None
    runs = [one.runs or 1 for one in figures]
    times = [estimate(one, machine).total_s for one in figures]
    return sum(a * b for a, b in zip(runs, times, strict=True)) / sum(runs)


def comparison_to_json(markov: Plan, full: Plan, rows: list[Row]) -> dict[str, Any]:
    """Return both reports and the rows as JSON values."""
    return to_json(markov) | {"var": to_json(full), "comparison": [dataclasses.asdict(row) for row in rows]}


def describe_comparison(markov: Plan, full: Plan, rows: list[Row]) -> str:
    """Return both reports, and memory and time of VAR over MVAR."""
    head = (
        "VAR over MVAR",
        "batch",
        "MVAR peak",
        "VAR peak",
        "ratio",
        "published ratio",
        "MVAR time",
        "VAR time",
        "ratio",
    )
    lines = [head]
    for row in rows:
        mb = row.published_mb
        published = f"{mb[1] / mb[0]:.2f}" if mb[0] and mb[1] else ""
        peaks = (*map(show_bytes, row.peaks), f"{row.peaks[1] / row.peaks[0]:.2f}", published)
        a, b = row.seconds
        times = ["refused" if x is None else show_time(x) for x in row.seconds]
        lines.append((row.part, str(row.batch), *peaks, *times, f"{b / a:.2f}" if a and b is not None else ""))
    return "\n".join([describe(markov), "", describe(full), "", *table(lines)])
