"""The platform and the generation of GPU that a program is traced for, on which `auto` choices depend."""

import re

import jax

from mvar_jax.errors import InputError

PLATFORMS = ("cpu", "gpu", "tpu")
HOPPER, BLACKWELL_DATACENTER = 9, 10  # major compute capabilities; GeForce cards of Blackwell have 12

# part of jit's cache key, so that a program traced for one target is not reused for another
_target = jax.make_user_context(None)


def compiling_for(platform: str, capability: str | None = None):
    """Return a context in which programs are traced for a machine that is not here.

    platform: what `current_platform()` returns in it.
    capability: the CUDA compute capability, such as "8.9"; if None, that of Hopper.
    """
    if platform not in PLATFORMS:
        expected = f"one of {', '.join(PLATFORMS)}"
        raise InputError(
            f"platform must be {expected}, got {platform!r}", field="platform", given=platform, expected=expected
        )
    return _target((platform, HOPPER if capability is None else major_of(capability)))


def current_platform() -> str:
    """Return cpu, gpu (CUDA or ROCm) or tpu: of `compiling_for` if it is active, else of jax's default device."""
    if _target.value is not None:
        return _target.value[0]
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # missing from the stubs of jax 0.10
    platform = device if isinstance(device, str) else getattr(device, "platform", None)
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def current_generation() -> int:
    """Return the major compute capability of the GPU that a program is traced for: 8 is Ampere and Ada, 9 Hopper.

    Returns 0 for a GPU without one (ROCm), and Hopper's on other platforms, where kernels are only interpreted.
    """
    if _target.value is not None:
        return _target.value[1]
    if current_platform() != "gpu":
        return HOPPER
    return major_of(str(getattr(jax.local_devices()[0], "compute_capability", "")))


def major_of(capability: str) -> int:
    """Return 8 for "8.9"; 0 if the text is no compute capability of CUDA, such as ROCm's "gfx942"."""
    found = re.match(r"(\d+)\.\d", capability)
    return int(found[1]) if found else 0
