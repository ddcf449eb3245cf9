"""Machines: peak rates and memory as their makers state them, and the names of compile targets."""

import dataclasses

from mvar_jax.errors import InputError
from mvar_jax.ops.platform import current_platform


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device as its maker states it: dense bfloat16 FLOP/s, memory bytes/s and bytes."""

    platform: str
    flops: float
    bandwidth: float
    memory_bytes: float
    smallest: str = "1"  # topology that a single device is taken from


MACHINES = {
    "a100": Machine("gpu", 312e12, 2.039e12, 80e9),
    "h100": Machine("gpu", 989e12, 3.35e12, 80e9),
    "h200": Machine("gpu", 989e12, 4.8e12, 141e9),
    "v4": Machine("tpu", 275e12, 1.2e12, 32 * 2**30, "2x2x1"),
    "v5e": Machine("tpu", 197e12, 0.819e12, 16 * 2**30, "2x2"),
    "v5p": Machine("tpu", 459e12, 2.765e12, 95 * 2**30, "2x2x1"),
    "v6e": Machine("tpu", 918e12, 1.64e12, 32 * 2**30, "2x2"),
}
HERE = "here"


# what a device calls itself (lower case, first match wins) -> its name in MACHINES
_DEVICE_KINDS = (
    ("h200", "h200"),
    ("h100", "h100"),
    ("a100", "a100"),
    ("v6", "v6e"),
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5", "v5p"),
    ("v4", "v4"),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device as its maker states it; None where that is not known."""
    for part, name in _DEVICE_KINDS:
        if part in device_kind.lower():
            return MACHINES[name].flops
    return None


def parse_target(target: str) -> tuple[str, str]:
    """ "h100:8" -> ("h100", "8"). Raises InputError for a machine that is not known."""
    name, _, shape = target.partition(":")
    if name not in (HERE, *MACHINES):
        raise InputError("target", target, f"one of here, {', '.join(MACHINES)}, as in h100:8")
    if shape and not all(part.isdecimal() and int(part) for part in shape.split("x")):
        raise InputError("target", target, "a shape such as h100:8, h100:2x8 (hosts x cards) or v5e:4x4")
    return name, shape


def platform_of(target: str) -> str:
    """cpu, gpu or tpu."""
    name, _ = parse_target(target)
    return current_platform() if name == HERE else MACHINES[name].platform
