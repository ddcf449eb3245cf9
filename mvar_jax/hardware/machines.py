"""Machines: peak rates and memory as published by their makers, and the names of compile targets.

Each machine is a file of targets/, which its fields describe; a file more is a target more.
"""

import dataclasses
import difflib
import functools
import math
from importlib import resources

from mvar_jax.errors import InputError, shorten
from mvar_jax.fields import from_dict
from mvar_jax.files.json_files import parse_json
from mvar_jax.ops.platform import current_platform
from mvar_jax.schema import NotNegative, Positive

HERE = "here"
PLATFORMS = ("gpu", "tpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device, by its data sheet.

    Attributes:
      name: what its maker calls it.
      source: where the figures are from.
      platform: gpu, tpu or cpu.
      device_kinds: parts of jax's `device_kind`, lower case.
      flops: dense FLOP/s by dtype of the operands; float32 as XLA multiplies it by default.
      memory_bytes: of the device.
      usable_bytes: what a program may use of it: what libtpu leaves, or the share of a GPU that JAX reserves.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that a device sends to the others of its host or TPU slice.
      network_bandwidth: bytes/s that a device sends to other hosts.
      launch_s: seconds that each kernel adds; no data sheet has them.
      allocation_s: seconds that each byte of a program's temporary memory adds: a CPU gets it anew for every run.
      smallest: smallest topology that contains one device.
      topology: options of libtpu's topology.
    """

    name: str
    source: str
    platform: str
    device_kinds: tuple[str, ...]
    flops: dict[str, float]
    memory_bytes: Positive
    usable_bytes: Positive
    memory_bandwidth: Positive
    link_bandwidth: Positive
    network_bandwidth: Positive
    launch_s: NotNegative = 0.0
    allocation_s: NotNegative = 0.0
    smallest: str = "1"
    topology: dict[str, str] | None = None

    def peak(self, dtype: str) -> float:
        """Return the dense FLOP/s for operands of a dtype; 16-bit floats have one rate."""
        return self.flops["float32" if dtype == "float32" else "bfloat16"]

    def check(self) -> None:
        """Raise ValueError if the values contradict each other, or a plan would divide by zero."""
        if missing := {"bfloat16", "float32"} - self.flops.keys():
            raise ValueError(f"flops lacks {' and '.join(sorted(missing))}")
        if bad := {name: value for name, value in self.flops.items() if not 0 < value < math.inf}:
            raise ValueError(f"flops must be above 0, got {bad}")
        if self.platform not in PLATFORMS:
            raise ValueError(f"platform must be {', '.join(PLATFORMS)}, got {self.platform}")
        if self.usable_bytes > self.memory_bytes:
            raise ValueError(f"usable_bytes must be at most memory_bytes, got {self.usable_bytes:.0f}")


def _folder():
    return resources.files("mvar_jax.hardware").joinpath("targets")


@functools.cache
def machine_names() -> tuple[str, ...]:
    """Return the names of the machines that have a file."""
    return tuple(sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".json")))


@functools.cache
def machine_of(name: str) -> Machine:
    """Return the machine of this name. Raises InputError if its file is damaged."""
    file = _folder().joinpath(f"{name}.json")
    try:
        machine = from_dict(Machine, dict(parse_json(file.read_text(encoding="utf-8"))), name)
        machine.check()
    except (OSError, ValueError, TypeError) as error:  # an InputError is a ValueError
        words = (
            f"the description of target {name} is damaged, install mvar_jax again or mend {file}: {shorten(error)}"
        )
        raise InputError(words, field="target", given=name, expected="a whole description") from None
    return machine


def gpu_description(name: str) -> str:
    """Return XLA's description of a GPU, a text proto. Raises InputError if it cannot be read."""
    file = _folder().joinpath(f"{name}.txtpb")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        words = f"target {name} needs {file}, XLA's description of the card, beside {name}.json: {shorten(error)}"
        raise InputError(words, field="target", given=name, expected="a description of the card") from None


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of one device by its data sheet, or None if the device is unknown."""
    machine = find_machine(device_kind)
    return machine and machine.peak("bfloat16")


def find_machine(device_kind: str) -> Machine | None:
    """Return the machine that calls itself `device_kind`, or None if it is unknown."""
    machines = [machine_of(name) for name in machine_names()]
    # the longest part wins: "v5" alone is a v5p, "v5 lite" a v5e
    parts = [
        (len(part), machine) for machine in machines for part in machine.device_kinds if part in device_kind.lower()
    ]
    return max(parts, key=lambda found: found[0], default=(0, None))[1]


def parse_target(target: str) -> tuple[str, str]:
    """Split "h100:8" into ("h100", "8"). Raises InputError if the machine or the shape is invalid."""
    name, _, shape = target.partition(":")
    known = (HERE, *machine_names())
    if name not in known:
        expected = f"one of {', '.join(known)}, with an optional shape such as h100:8"
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}{target[len(name) :]}" if near else ""
        message = f"target must be {expected}{hint}, got {target!r}"
        raise InputError(message, field="target", given=target, expected=expected)
    if name == HERE and shape:
        message = f"target here has no shape: it is all devices of this machine, got {target!r}"
        raise InputError(message, field="target", given=target, expected=HERE)
    if shape and not all(part.isdecimal() and int(part) for part in shape.split("x")):
        raise _bad_shape(target)
    if name != HERE and shape.count("x") > 1 and machine_of(name).platform == "gpu":
        raise _bad_shape(target)
    return name, shape


def _bad_shape(target: str) -> InputError:
    expected = "a machine and a shape such as h100:8, h100:2x8 (hosts x cards) or v5e:4x4"
    return InputError(f"target must be {expected}, got {target!r}", field="target", given=target, expected=expected)


def platform_of(target: str) -> str:
    """Return cpu, gpu or tpu."""
    name, _ = parse_target(target)
    return current_platform() if name == HERE else machine_of(name).platform
