"""Machines: peak rates and memory as published by their makers, and the names of compile targets."""

import dataclasses

from mvar_jax.errors import InputError
from mvar_jax.ops.platform import current_platform


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: dense bfloat16 FLOP/s, memory bandwidth in bytes/s and memory in bytes, by its data sheet."""

    platform: str
    flops: float
    bandwidth: float
    memory_bytes: float
    smallest: str = "1"  # smallest topology that contains one device


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


# part of jax's device_kind (lower case, first match wins) -> name in MACHINES
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
    """Return the dense bfloat16 FLOP/s of one device by its data sheet, or None if the device is unknown."""
    for part, name in _DEVICE_KINDS:
        if part in device_kind.lower():
            return MACHINES[name].flops
    return None


def parse_target(target: str) -> tuple[str, str]:
    """Split "h100:8" into ("h100", "8"). Raises InputError if the machine or the shape is invalid."""
    name, _, shape = target.partition(":")
    if name not in (HERE, *MACHINES):
        expected = f"one of here, {', '.join(MACHINES)}, with an optional shape such as h100:8"
        message = f"target must be {expected}, got {target!r}"
        raise InputError(message, field="target", given=target, expected=expected)
    if shape and not all(part.isdecimal() and int(part) for part in shape.split("x")):
        expected = "a machine and a shape such as h100:8, h100:2x8 (hosts x cards) or v5e:4x4"
        message = f"target must be {expected}, got {target!r}"
        raise InputError(message, field="target", given=target, expected=expected)
    return name, shape


def platform_of(target: str) -> str:
    """Return cpu, gpu or tpu."""
    name, _ = parse_target(target)
    return current_platform() if name == HERE else MACHINES[name].platform
