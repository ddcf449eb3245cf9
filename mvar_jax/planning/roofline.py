"""Least time of a program by the rates of a machine, and what bounds it."""

import collections
import dataclasses

from mvar_jax.hardware.machines import Machine
from mvar_jax.hardware.work import Collective
from mvar_jax.planning.figures import Figures

BOUNDS = ("compute", "memory", "network", "launches")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program by what bounds each of its instructions."""

    compute_s: float
    memory_s: float
    network_s: float
    launches_s: float

    @property
    def total_s(self) -> float:
        """Return the seconds of a run; nothing overlaps."""
        return self.compute_s + self.memory_s + self.network_s + self.launches_s

    @property
    def bound(self) -> str:
        """Return what takes most of the time: compute, memory, network or launches."""
        return max(BOUNDS, key=lambda name: getattr(self, f"{name}_s"))


def estimate(figures: Figures, machine: Machine) -> Estimate:
    """Return the least time of a program.

    Each instruction takes its launch and the longer of its products at the peak rate and its bytes at the memory's; a
    collective takes its bytes in a ring at the rate of the slowest link of its group (see `_rate`).
    """
    seconds = collections.Counter(dict.fromkeys(BOUNDS, 0.0))
    seconds["memory"] += figures.activation_bytes * machine.allocation_s
    for work in figures.work:
        compute, memory = work.flops / machine.peak(work.dtype), work.num_bytes / machine.memory_bandwidth
        seconds["compute" if compute > memory else "memory"] += work.times * max(compute, memory)
        seconds["launches"] += work.times * machine.launch_s
    for one in figures.collectives:
        seconds["network"] += one.sent_bytes / _rate(one, machine)
    return Estimate(*(seconds[name] for name in BOUNDS))


def _rate(one: Collective, machine: Machine) -> float:
    """Return the bytes/s that each device of a group sends to the next in a ring.

    A ring leaves a host once. A host has as many rings as devices in the group, each over the network share of one
    device, so that a device sends at the rate of all of them.
    """
    if one.num_hosts == 1:
        return machine.link_bandwidth
    return min(machine.link_bandwidth, one.num_devices / one.num_hosts * machine.network_bandwidth)
