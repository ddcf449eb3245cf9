"""Compiles for a machine that is not here: XLA's own figures of memory and work, no device needed.

CUDA targets need jax's CUDA plugin installed (`pip install "jax[cuda12]"`), TPU targets libtpu (`pip install
"jax[tpu]"`); "here" compiles for the devices at hand.
"""

import contextlib
import dataclasses
import functools
import os
from importlib import resources

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from mvar_jax.errors import InputError
from mvar_jax.hardware.machines import HERE, MACHINES, parse_target, platform_of
from mvar_jax.ops.platform import compiling_for

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a program, for one device. Bytes; flops and bytes_accessed count a loop's body once and
    custom calls as nothing, and are None where XLA does not tell."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float | None
    bytes_accessed: float | None
    text: str

    @property
    def total_bytes(self) -> int:
        """Everything that lies on the device while the program runs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


@functools.cache
def devices_of(target: str) -> tuple:
    """The devices of a target: "h100", "h100:8", "h100:2x8" (hosts x cards), "v5e:4x4" or "here".

    Raises InputError for an unknown target, or one whose compiler is not installed.
    """
    name, shape = parse_target(target)
    if name == HERE:
        return tuple(jax.devices())
    machine = MACHINES[name]
    try:
        if machine.platform == "gpu":
            return _cuda_devices(name, shape or machine.smallest)
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape or machine.smallest}")
        return tuple(topology.devices) if shape else tuple(topology.devices[:1])
    except Exception as error:  # jax raises many kinds where a plugin is missing
        extra = "cuda12" if machine.platform == "gpu" else "tpu"
        reason = " ".join(str(error).split())[:200]
        raise InputError("target", target, f'a compiler for it: pip install "jax[{extra}]" ({reason})') from error


def _cuda_devices(name: str, shape: str) -> tuple:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver here
    jax.devices()  # a backend must be up before the plugin is asked
    hosts, _, cards = shape.rpartition("x")
    text = resources.files("mvar_jax.hardware").joinpath("targets", f"{name}.txtpb").read_text()
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=text, topology=f"1x{hosts or 1}x{cards}"
    )
    return tuple(topology.devices)


def compile_for(target: str, fn, *shapes, shardings=None, donate=(), options: dict | None = None) -> Compiled:
    """Compiles fn(*shapes) for a target; nothing runs.

    shapes: trees of `jax.ShapeDtypeStruct`. shardings: in_shardings over a mesh of `devices_of(target)`, None to
    keep whole copies. donate: argument numbers whose buffers may be reused. options: XLA's, by name. `auto`
    backends choose as they would on the target.

    Raises InputError for an unknown target or one whose compiler is missing.
    """
    devices = devices_of(target)
    whole = NamedSharding(Mesh(np.asarray(devices), ("all",)), PartitionSpec())
    named = contextlib.nullcontext()
    if platform_of(target) == "gpu" and target != HERE:
        # without a device, XLA cannot tune Triton's matrix products and fails on some shapes
        options = {"xla_gpu_enable_triton_gemm": False, **(options or {})}
        if jax.sharding.get_abstract_mesh().empty:
            # jax 0.11's Triton asks for the kind of GPU: a mesh without axes names it, and is none to `constrain`
            named = use_abstract_mesh(AbstractMesh((), (), abstract_device=whole.mesh.abstract_mesh.abstract_device))
    with compiling_for(platform_of(target)), named:
        jitted = jax.jit(fn, in_shardings=whole if shardings is None else shardings, donate_argnums=donate)
        program = jitted.lower(*shapes).compile(compiler_options=options)
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


def _cost(program) -> dict:
    """XLA's cost analysis; a CUDA program without a device has none, then the CPU client's of the same module."""
    try:
        if cost := program.cost_analysis():
            return cost
        from jaxlib import _jax

        client = jax.devices("cpu")[0].client
        return dict(_jax.hlo_module_cost_analysis(client, program.runtime_executable().hlo_modules()[0]))
    except Exception:  # private calls that another jaxlib may lack; the memory figures do not need them
        return {}
