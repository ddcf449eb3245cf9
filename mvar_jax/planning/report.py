"""The report of a plan: a table, the whole run, whether it fits; as text, JSON and a chart."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from mvar_jax.files.atomic import replacing
from mvar_jax.hardware.machines import Machine
from mvar_jax.planning.advice import Change, largest_of
from mvar_jax.planning.figures import Figures
from mvar_jax.planning.roofline import BOUNDS, Estimate, estimate
from mvar_jax.training.programs import SAMPLE, TRAIN

GIB = 2**30
COLUMNS = ("program", "parameters", "optimizer", "other inputs", "activations", "peak", "TFLOP", "moved", "sent")
COLUMNS += ("bound", "time", "images/s", "MFU")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's programs on a machine.

    Attributes:
      config: name of the config.
      target, machine: where they run.
      mesh: sizes by axis.
      batch_size, num_steps: of the training.
      figures: of the programs.
      whole: dimensions that the mesh does not divide, with what they cost.
      change: the first that would make it fit, None if it fits or no single one would.
    """

    config: str
    target: str
    machine: Machine
    mesh: dict[str, int]
    batch_size: int
    num_steps: int
    figures: tuple[Figures, ...]
    whole: tuple[str, ...]
    change: Change | None

    @property
    def num_devices(self) -> int:
        """Return the number of devices of the mesh."""
        data, fsdp, tensor = self.mesh.values()
        return data * fsdp * tensor

    @property
    def is_fitting(self) -> bool:
        """Return whether every program fits."""
        return all(self.fits(one) for one in self.figures)

    def fits(self, one: Figures) -> bool:
        """Return whether a program fits."""
        return not one.is_refused and one.peak_bytes <= self.machine.usable_bytes

    @property
    def run_s(self) -> float | None:
        """Return the seconds of a training run, None if a step of it was not compiled."""
        steps = [one for one in self.figures if one.part == TRAIN]
        if any(one.is_refused for one in steps) or round(sum(one.runs for one in steps)) < self.num_steps:
            return None
        return sum(one.runs * estimate(one, self.machine).total_s for one in steps)

    def mfu(self, one: Figures, time: Estimate) -> float | None:
        """Return the model's FLOPs as a share of the peak; None if they are not counted."""
        if not one.model_flops or not time.total_s:
            return None
        return one.model_flops / time.total_s / self.machine.peak("bfloat16") / self.num_devices


def show_number(x: float) -> str:
    """Return a number of three digits such as "5.71", above 999 with all its digits such as "1,234"."""
    return f"{x:,.0f}" if x >= 999.5 else f"{x:.3g}"


def show_bytes(num_bytes: float) -> str:
    """Return a size such as "5.71 GiB"."""
    for name, unit in (("GiB", GIB), ("MiB", 2**20)):
        if num_bytes >= unit:
            return f"{show_number(num_bytes / unit)} {name}"
    return f"{show_number(num_bytes / 2**10)} KiB" if num_bytes else "0"


def show_time(seconds: float) -> str:
    """Return a time such as "41.2 ms"."""
    return f"{show_number(seconds)} s" if seconds >= 1 else f"{show_number(1e3 * seconds)} ms"


def describe(plan: Plan) -> str:
    """Return the report as text, sizes and work for each device."""
    sizes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{plan.config} on {plan.target}: {plan.num_devices} x {plan.machine.name}, mesh {sizes}, "
        f"batch {plan.batch_size}; for each device:",
        "",
        *table([COLUMNS, *(_row(plan, one) for one in plan.figures)]),
        "",
        *_collectives(plan),
        *(f"whole on every device: {one}" for one in plan.whole),
        *_whole_run(plan),
        verdict(plan),
    ]
    return "\n".join(lines)


def _row(plan: Plan, one: Figures) -> tuple[str, ...]:
    other = max(0, one.argument_bytes - one.params_bytes - one.optimizer_bytes)
    sizes = (one.params_bytes, one.optimizer_bytes, other, one.activation_bytes, one.peak_bytes)
    cells = (one.name, *map(show_bytes, sizes))
    if one.is_refused:
        return *cells, *[""] * 3, "refused", *[""] * 3
    time = estimate(one, plan.machine)
    sent, mfu = sum(part.sent_bytes for part in one.collectives), plan.mfu(one, time)
    rate = show_number(one.images / time.total_s) if one.images and time.total_s else ""
    work = show_number(one.flops / 1e12), show_bytes(one.num_bytes), show_bytes(sent)
    return *cells, *work, time.bound, show_time(time.total_s), rate, "" if mfu is None else f"{100 * mfu:.0f}%"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    return ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


def _collectives(plan: Plan) -> list[str]:
    rows = [("collectives", "kind", "runs", "of devices", "over", "bytes")]
    for one in plan.figures:
        found: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0])
        for part in one.collectives:
            over = "network" if part.num_hosts > 1 and plan.machine.platform == "gpu" else "links"
            total = found[part.kind, part.num_devices, over]
            total[0] += part.times
            total[1] += part.times * part.num_bytes
        for (kind, num_devices, over), (times, num_bytes) in sorted(found.items()):
            rows.append((one.name, kind, f"{times:,.0f}", str(num_devices), over, show_bytes(num_bytes)))
    return [*table(rows), ""] if len(rows) > 1 else []


def _whole_run(plan: Plan) -> list[str]:
    if plan.run_s is None:
        return []
    hours = plan.run_s / 3600
    took = f"{show_number(hours / 24)} days" if hours >= 24 else f"{show_number(hours)} hours"
    return [
        f"whole run: {plan.num_steps:,} steps, {took}, {hours * plan.num_devices:,.0f} device-hours at least: each "
        "instruction at the peak of its machine, nothing beside the steps"
    ]


def verdict(plan: Plan) -> str:
    """Return whether the programs fit, and if not, what would make them."""
    largest = largest_of(list(plan.figures))
    usable = show_bytes(plan.machine.usable_bytes)
    needs = f"{largest.name} needs {show_bytes(largest.peak_bytes)} of {usable}"
    if plan.is_fitting:
        return f"fits: {needs}"
    if largest.peak_bytes <= plan.machine.usable_bytes:  # the compiler did not say how much one needs
        needs = f"the compiler refused {', '.join(one.name for one in plan.figures if one.is_refused)} for {usable}"
    if plan.change is not None:
        saved = show_bytes(plan.change.saved_bytes)
        return f"does not fit: {needs}; {plan.change.words} would save about {saved} of a step and make the steps fit"
    steps = [one for one in plan.figures if one.part == TRAIN]
    if steps and not all(plan.fits(one) for one in steps):
        return (
            f"does not fit: {needs}, and no single change would make the steps fit; --search tries several together"
        )
    others = ", but training does" if steps else ""
    remedy = "--samples with fewer images" if largest.part == SAMPLE else "cache_tokens with a smaller --batch_size"
    return f"does not fit: {needs}{others}; {remedy} would make it fit"


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the report as JSON values."""
    programs = []
    for one in plan.figures:
        values = dataclasses.asdict(one)
        del values["work"]
        time = estimate(one, plan.machine)
        values |= {"peak_bytes": one.peak_bytes, "flops": one.flops, "bytes_moved": one.num_bytes}
        values["sent_bytes"] = sum(part.sent_bytes for part in one.collectives)
        if not one.is_refused:
            values |= {"seconds": dataclasses.asdict(time), "bound": time.bound, "mfu": plan.mfu(one, time)}
            values["images_per_s"] = one.images / time.total_s if time.total_s else None
        programs.append(values)
    hours = None if plan.run_s is None else plan.run_s / 3600
    return {
        "config": plan.config,
        "target": plan.target,
        "machine": dataclasses.asdict(plan.machine),
        "mesh": plan.mesh,
        "batch_size": plan.batch_size,
        "num_steps": plan.num_steps,
        "programs": programs,
        "whole_dimensions": list(plan.whole),
        "days": hours and hours / 24,
        "device_hours": hours and hours * plan.num_devices,
        "fits": plan.is_fitting,
        "change": plan.change and dataclasses.asdict(plan.change),
        "verdict": verdict(plan),
    }


def draw_chart(path: Path, plan: Plan) -> None:
    """Write a PNG: memory of each program with the device's limit, and time by what bounds it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.4 * len(plan.figures)), layout="constrained")
    FigureCanvasAgg(figure)
    memory, times = figure.subplots(1, 2, sharey=True)
    names = [one.name for one in plan.figures]
    state = [(one.params_bytes, one.optimizer_bytes) for one in plan.figures]
    parts = {
        "parameters": [params for params, _ in state],
        "optimizer": [optimizer for _, optimizer in state],
        "other inputs": [one.argument_bytes - sum(own) for one, own in zip(plan.figures, state, strict=True)],
        "activations": [one.activation_bytes for one in plan.figures],
    }
    _draw_stacked(memory, names, {name: [x / GIB for x in values] for name, values in parts.items()})
    memory.axvline(plan.machine.usable_bytes / GIB, color="black", linestyle=":", label="usable")
    memory.set(xlabel="GiB on each device", title=f"{plan.config} on {plan.target}")
    estimates = [estimate(one, plan.machine) for one in plan.figures]
    by_bound = {name: [1e3 * getattr(one, f"{name}_s") for one in estimates] for name in BOUNDS}
    _draw_stacked(times, names, by_bound)
    times.set(xlabel="ms at least", title=f"{plan.num_devices} x {plan.machine.name}")
    for axis in (memory, times):
        axis.legend()
    memory.invert_yaxis()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw_stacked(axis, names: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for label, values in parts.items():
        axis.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
