"""Compilation for a machine that is not here: XLA's figures of memory and work, without a device.

CUDA targets need jax's CUDA plugin (`pip install "jax[cuda12]"`), TPU targets libtpu (`pip install "jax[tpu]"`);
"here" compiles for the devices of this machine.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from mvar_jax.errors import InputError, shorten
from mvar_jax.hardware.machines import HERE, gpu_description, machine_of, parse_target, platform_of
from mvar_jax.ops.platform import compiling_for

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's figures of a compiled program, for one device.

    flops and bytes_accessed count a loop's body once and custom calls as zero; None if XLA does not report them.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float | None
    bytes_accessed: float | None
    text: str

    @property
    def total_bytes(self) -> int:
        """Return the memory on the device while the program runs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


@functools.cache
def devices_of(target: str) -> tuple:
    """Return the devices of a target: "h100", "h100:8", "h100:2x8" (hosts x cards), "v5e:4x4" or "here".

    Raises InputError if the target is unknown or its compiler is not installed.
    """
    name, shape = parse_target(target)
    if name == HERE:
        return tuple(jax.devices())
    machine = machine_of(name)
    description = gpu_description(name) if machine.platform == "gpu" else ""
    try:
        if machine.platform == "gpu":
            return _cuda_devices(description, shape or machine.smallest)
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        slice_name, options = f"{name}:{shape or machine.smallest}", machine.topology or {}
        topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options)
        return tuple(topology.devices) if shape else tuple(topology.devices[:1])
    except Exception as error:  # jax raises errors of many types if a plugin is missing
        reason = shorten(error)
        if machine.platform == "tpu" and importlib.util.find_spec("libtpu"):
            expected = f"a slice that libtpu knows, such as {name}:{machine.smallest}"
            message = f"target must be {expected}, got {target!r}: {reason}"
            raise InputError(message, field="target", given=target, expected=expected) from error
        extra = "cuda12" if machine.platform == "gpu" else "tpu"
        expected = f'its compiler installed by `pip install "mvar_jax[{extra}]"` ({reason})'
        message = f"target {target} needs {expected}"
        raise InputError(message, field="target", given=target, expected=expected) from error


def _cuda_devices(description: str, shape: str) -> tuple:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver here
    jax.devices()  # a backend must be initialized before the plugin is used
    hosts, _, cards = shape.rpartition("x")
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=description, topology=f"1x{hosts or 1}x{cards}"
    )
    return tuple(topology.devices)


def compiling_for_target(target: str):
    """Return a context in which programs are traced for a target, of this machine or not."""
    capability = str(getattr(devices_of(target)[0], "compute_capability", "")) or None
    return compiling_for(platform_of(target), capability)


def compile_for(target: str, fn, *shapes, shardings=None, donate=(), options: dict | None = None) -> Compiled:
    """Compile fn(*shapes) for a target without running it; `auto` backends choose as on the target.

    Args:
      shapes: trees of `jax.ShapeDtypeStruct`.
      shardings: in_shardings over a mesh of `devices_of(target)`; None replicates.
      donate: numbers of arguments whose buffers may be reused.
      options: XLA's compiler options by name.

    Raises InputError if the target is unknown or its compiler is missing.
    """
    whole = NamedSharding(Mesh(np.asarray(devices_of(target)), ("all",)), PartitionSpec())
    jitted = jax.jit(fn, in_shardings=whole if shardings is None else shardings, donate_argnums=donate)
    return compile_jitted(target, jitted, *shapes, options=options)


def compile_jitted(target: str, jitted, *arguments, options: dict | None = None) -> Compiled:
    """Compile a jitted function for a target, as `compile_for`.

    arguments: those of the function; shapes carry shardings over a mesh of `devices_of(target)`.

    Raises OutOfMemory if the compiler refuses a program that is larger than the device.
    """
    named = contextlib.nullcontext()
    if platform_of(target) == "gpu" and target != HERE:
        # without a device, XLA cannot tune Triton's matrix products and fails on some shapes
        options = {"xla_gpu_enable_triton_gemm": False, **(options or {})}
        if jax.sharding.get_abstract_mesh().empty:
            # jax 0.11's Triton needs the kind of GPU: a mesh without axes names it; `constrain` ignores that mesh
            mesh = Mesh(np.asarray(devices_of(target)), ("all",)).abstract_mesh
            named = use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_device))
    with compiling_for_target(target), named:
        lowered = jitted.lower(*arguments)
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            raise _out_of_memory(error) or error from None
    memory, cost = program.memory_analysis(), _cost(program)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
        program.as_text(),
    )


class OutOfMemory(Exception):
    """A program that the compiler refuses. needed_bytes: what it needs with its arguments, 0 if that is not known."""

    def __init__(self, needed_bytes: int):
        self.needed_bytes = needed_bytes
        super().__init__(f"needs {needed_bytes} bytes")


def _out_of_memory(error: Exception) -> OutOfMemory | None:
    """Return the compiler's error as OutOfMemory, None if it is another one."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    found = re.search(r"(?:\(|Used )([\d.]+)([KMGT])\)? (?:exceeds|of)", str(error))
    return OutOfMemory(int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))) if found else 0)


def _cost(program) -> dict:
    """Return XLA's cost analysis; for a CUDA program without a device, that of the CPU client for the same module."""
    try:
        if cost := program.cost_analysis():
            return cost
        from jaxlib import _jax

        client = jax.devices("cpu")[0].client
        return dict(_jax.hlo_module_cost_analysis(client, program.runtime_executable().hlo_modules()[0]))
    except Exception:  # private calls that another jaxlib may lack; the memory figures do not need them
        return {}
