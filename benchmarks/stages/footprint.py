"""What one program takes on the devices here: peak memory and seconds, on constant weights and inputs."""

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.stages.measure import peak_mib
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB
from mvar_jax.sharding import use_mesh

SETTLE_S = 0.1  # in which a CPU frees what the program before it used


@contextlib.contextmanager
def count_allocations() -> Iterator[list[int]]:
    """Count every allocation of this process within the `with` block, of all libraries.

    Yields a list which has, after the block, the most bytes that were held at once of what it allocated.
    """
    if importlib.util.find_spec("memray") is None:
        raise InputError("the memory of a CPU is counted by memray: pip install memray", field="memray")
    import memray

    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        with memray.Tracker(file := Path(folder) / "allocations"):
            yield peaks
        peaks.append(memray.FileReader(file).metadata.peak_memory)


def make(shapes):
    """Return arrays for a program's arguments: floats of one value, integers zero, keys of seed 0."""

    def one(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), x.sharding)
        value = 0.02 if jnp.issubdtype(x.dtype, jnp.floating) else 0
        # JAX's own memory: what lies in numpy's cannot be donated, and the step would make another state
        return jnp.full(x.shape, value, x.dtype, device=x.sharding)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))


def is_cpu() -> bool:
    return jax.default_backend() == "cpu"


class Loads:
    """The number of programs that were found in the cache of compiled programs within the `with` block."""

    def __enter__(self) -> "Loads":
        self.number = 0
        jax.monitoring.register_event_listener(self._note)
        return self

    def _note(self, event: str, **_) -> None:
        self.number += event == "/jax/compilation_cache/cache_hits"

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_listener(self._note)


def run(task, program, argument_bytes: int, rounds: int) -> tuple[list[float | None], list[float]]:
    """Return (MiB, seconds) of some rounds.

    A CPU has separate rounds for each, since counting takes time. Elsewhere the peak of this process is that of
    the program if it is the only one here, and None if it was not found in the cache of compiled programs: to compile
    it can take more.
    """
    peaks: list[float | None] = []
    seconds, on_cpu = [], is_cpu()

    def call() -> float:
        arguments = jax.block_until_ready(make(program.arguments))  # a training step takes its own away
        begin = time.perf_counter()
        jax.block_until_ready(program.jitted(*arguments))
        return time.perf_counter() - begin

    with use_mesh(task.run.mesh):
        arguments = jax.block_until_ready(make(program.arguments))
        with Loads() as loads:
            jax.block_until_ready(program.jitted(*arguments))
        del arguments
        for _ in range(rounds):
            seconds.append(call())
            if on_cpu:
                arguments = jax.block_until_ready(make(program.arguments))
                time.sleep(SETTLE_S)
                with count_allocations() as counted:
                    jax.block_until_ready(program.jitted(*arguments))
                peaks.append((argument_bytes + counted[0]) / MIB)
            elif loads.number:
                peaks.append(peak_mib())
    return peaks or [None], seconds
