"""What a stage in jax needs: modules and random weights, compilation in threads, times, memory, conditions."""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import make_modules
from mvar_jax.hardware.compiling import MIB
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer

TINY = "tiny"  # a size for a dry run: nothing is measured
NUM_THREADS = 8


def modules_of(args) -> tuple[Tokenizer, Transformer]:
    """Return (tokenizer, transformer) of --size and --depth, computed in bfloat16."""
    if args.size != TINY:
        sizes = {"size": int(args.size), "depth": args.depth, "dtype": "bfloat16", "backend": args.backend}
        return make_modules(argparse.Namespace(**sizes), "markov")
    sides, sizes = (1, 3), {"vocab_size": 16, "code_width": 4}
    tokenizer = Tokenizer(sides, ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, num_phi=2, **sizes)
    depth = args.depth
    transformer = Transformer(
        sides,
        1,
        3,
        num_classes=3,
        depth=depth,
        width=16 * depth,
        num_heads=depth,
        window_backend=args.backend,
        **sizes,
    )
    return tokenizer, transformer


def fill(shapes, std: float = 0.02):
    """Return arrays of these shapes from one table of normal numbers, which no program on the device draws."""
    table = (std * np.random.default_rng(0).standard_normal((1 << 20) + 7)).astype(np.float32)

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(np.resize(table, x.shape), x.dtype)

    return jax.tree.map(one, shapes)


def compile_all(lowers: dict[str, Callable]) -> tuple[dict, dict[str, float]]:
    """Compile what each function lowers, in threads; return (programs or exceptions, seconds), both by name."""

    def build(lower):
        begin = time.perf_counter()
        try:
            return lower().compile(), time.perf_counter() - begin
        except Exception as error:  # one that does not compile is a result, and the others go on
            return error, time.perf_counter() - begin

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        done = dict(zip(lowers, pool.map(build, lowers.values()), strict=True))
    return {name: program for name, (program, _) in done.items()}, {name: s for name, (_, s) in done.items()}


def compiled_mib(program) -> float:
    """Return XLA's figure of everything on the device while a program runs."""
    m = program.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return total / MIB


def peak_mib() -> float | None:
    """Return the largest memory that this process held on the device so far, None if jax does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / MIB if "peak_bytes_in_use" in stats else None


def time_rounds(run: Callable, rounds: int) -> list[float]:
    """Return the milliseconds of each of `rounds` calls, after an untimed one."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def why(error: Exception) -> str:
    """Return an error as one short line for a cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".replace("|", "/")


def conditions(device: str, *packages: str) -> dict[str, str]:
    """Return what a stage runs on: device, driver, versions of packages, XLA's flags."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    return {
        "device": device,
        "driver": driver(),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
        "XLA_FLAGS": f"`{flags}`" if (flags := os.environ.get("XLA_FLAGS", "").strip()) else "",
    }


def jax_conditions() -> dict[str, str]:
    return conditions(jax.devices()[0].device_kind, "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def driver() -> str:
    """Return the version of the NVIDIA driver, "" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""
