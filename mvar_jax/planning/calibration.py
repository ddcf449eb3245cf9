"""The machine of a target: by its data sheet, or for the devices here by what small programs take."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.hardware.machines import HERE, Machine, find_machine, machine_of, parse_target
from mvar_jax.hardware.work import work_of
from mvar_jax.ops.gelu import gelu
from mvar_jax.ops.platform import current_platform

# (side of the product, bytes of the loop) that take longer than their launch: on a CPU, elsewhere. glibc keeps freed
# arrays of up to 32 MiB, so larger ones show what new memory costs.
SIZES = {True: (2048, 2**26), False: (8192, 2**29)}
SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# of a timed round. An accelerator works through a queue, so that neither the way to it nor the wait for it counts
NUM_CALLS = {True: 1, False: 10}
NUM_LAUNCHES = 1000
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the first device here does, as in `Machine`."""

    flops: dict[str, float]
    memory_bandwidth: float
    launch_s: float
    allocation_s: float


def machine_for(target: str) -> Machine:
    """Return the machine of a target; that of the devices here has measured rates."""
    name, _ = parse_target(target)
    if name != HERE:
        machine = machine_of(name)
        if machine.platform == "gpu" and (share := os.environ.get(SHARE)):
            return dataclasses.replace(machine, usable_bytes=_share_of(share) * machine.memory_bytes)
        return machine
    device, rates = jax.devices()[0], measure_rates()
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    usable = memory / jax.local_device_count()
    if limit := (device.memory_stats() or {}).get("bytes_limit"):  # of an accelerator: what JAX may use of it
        memory = usable = float(limit)
    if known := find_machine(device.device_kind):
        measured = dataclasses.asdict(rates) | {"memory_bytes": max(memory, known.memory_bytes)}
        return dataclasses.replace(known, **measured, usable_bytes=usable)
    return Machine(
        name=f"{device.device_kind} (here)",
        source="measured: a product, a loop, launches and allocation; memory as the system names it",
        platform=current_platform(),
        device_kinds=(),
        flops=rates.flops,
        memory_bytes=memory,
        usable_bytes=usable,
        memory_bandwidth=rates.memory_bandwidth,
        link_bandwidth=rates.memory_bandwidth,
        network_bandwidth=rates.memory_bandwidth,
        launch_s=rates.launch_s,
        allocation_s=rates.allocation_s,
    )


def _share_of(text: str) -> float:
    """Parse the share of a GPU's memory that JAX reserves. Raises InputError unless it is above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        expected = "a share of the memory above 0 and up to 1"
        raise InputError(f"{SHARE} must be {expected}, got {text!r}", field=SHARE, given=text, expected=expected)
    return share


@functools.cache
def measure_rates() -> Rates:
    """Return the rates of the first device here.

    A CPU reads its caches 20 times as fast as it writes new pages, and most loops of a model take longer to calculate
    than to read. So the memory's rate is that of a loop of the model, its GELU in place.
    Operands are random: on equal numbers an accelerator draws less power and runs about 10% faster.
    """
    on_cpu = current_platform() == "cpu"
    (side, num_bytes), num_calls, key = SIZES[on_cpu], NUM_CALLS[on_cpu], jax.random.key(0)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        # a chain of products with it neither grows nor vanishes
        x = (side**-0.5 * jax.random.normal(key, (side, side))).astype(dtype)
        product = jax.jit(jnp.matmul)
        flops[dtype] = 2 * side**3 / _least_s(lambda y, x=x, product=product: product(y, x), x, num_calls)
    x, loop = jax.random.normal(key, (num_bytes // 4,)), jax.jit(gelu)
    new_s = _least_s(lambda _: loop(x), None) if on_cpu else 0.0
    in_place_s = _least_s(jax.jit(gelu, donate_argnums=0), x, num_calls)
    return Rates(flops, 2 * num_bytes / in_place_s, _measure_launch_s(), max(0.0, new_s - in_place_s) / num_bytes)


def _measure_launch_s() -> float:
    """Return the seconds that a loop of tiny products takes for each kernel that the plan would count."""
    body = lambda _, x: jnp.tanh(x @ x)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, NUM_LAUNCHES, body, x)).lower(jnp.ones((8, 8))).compile()
    num_kernels = sum(work.times for work in work_of(program.as_text(), (0,))[0])
    return _least_s(program, jnp.ones((8, 8))) / num_kernels


def _least_s(call: Callable[[Any], Any], x: Any, num_calls: int = 1) -> float:
    """Return the least seconds of a call over rounds of `num_calls`, each with the result of the one before."""
    found = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        for _ in range(num_calls):
            x = call(x)
        x = jax.block_until_ready(x)
        found.append((time.perf_counter() - begin) / num_calls)
    return min(found[1:])  # the first compiles
