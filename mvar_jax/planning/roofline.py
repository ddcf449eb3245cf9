"""Least time of a program by the rates of a machine, and what bounds it."""

import collections
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp

from mvar_jax.hardware.machines import HERE, Machine, find_machine, machine_of, parse_target
from mvar_jax.ops.platform import current_platform
from mvar_jax.planning.figures import Figures

BOUNDS = ("compute", "memory", "network")
SIDE = 2048  # of the product that calibrates the devices here
COPIED_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program by what bounds each of its instructions."""

    compute_s: float
    memory_s: float
    network_s: float

    @property
    def total_s(self) -> float:
        """Return the seconds of a run; nothing overlaps."""
        return self.compute_s + self.memory_s + self.network_s

    @property
    def bound(self) -> str:
        """Return what takes most of the time: compute, memory or network."""
        return max(BOUNDS, key=lambda name: getattr(self, f"{name}_s"))


def estimate(figures: Figures, machine: Machine) -> Estimate:
    """Return the least time of a program.

    Each instruction takes the longer of its products at the peak rate and its bytes at the memory's; a collective
    takes its bytes in a ring at the rate of the slowest link of its group.
    """
    seconds = collections.Counter(dict.fromkeys(BOUNDS, 0.0))
    for work in figures.work:
        compute, memory = work.flops / machine.peak(work.dtype), work.num_bytes / machine.memory_bandwidth
        seconds["compute" if compute > memory else "memory"] += work.times * max(compute, memory)
    for one in figures.collectives:
        rate = machine.network_bandwidth if one.crosses_hosts else machine.link_bandwidth
        seconds["network"] += one.sent_bytes / rate
    return Estimate(*(seconds[name] for name in BOUNDS))


def machine_for(target: str) -> Machine:
    """Return the machine of a target; that of the devices here has rates that one product and one copy measure."""
    name, _ = parse_target(target)
    if name != HERE:
        machine = machine_of(name)
        if machine.platform == "gpu" and (share := os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")):
            return dataclasses.replace(machine, usable_bytes=float(share) * machine.memory_bytes)
        return machine
    device = jax.devices()[0]
    flops, bandwidth = _measure_rates()
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if known := find_machine(device.device_kind):
        return dataclasses.replace(known, flops=flops, memory_bandwidth=bandwidth)
    return Machine(
        name=f"{device.device_kind} (here)",
        source="measured: one product, one copy, and the memory that the system names",
        platform=current_platform(),
        device_kinds=(),
        flops=flops,
        memory_bytes=memory,
        usable_bytes=memory / jax.local_device_count(),
        memory_bandwidth=bandwidth,
        link_bandwidth=bandwidth,
        network_bandwidth=bandwidth,
    )


@functools.cache
def _measure_rates() -> tuple[dict[str, float], float]:
    """Return (FLOP/s by dtype, bytes/s of memory) of the first device here."""
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((SIDE, SIDE), dtype)
        flops[dtype] = 2 * SIDE**3 / _best_s(lambda x=x: multiply(x, x))
    x = jnp.ones(COPIED_BYTES // 4)
    return flops, 2 * COPIED_BYTES / _best_s(lambda: copy(x))


def _best_s(call) -> float:
    """Return the least seconds of three calls after one that compiles."""
    jax.block_until_ready(call())
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return min(found)
