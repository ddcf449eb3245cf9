"""The platform that a program is traced for, on which `auto` choices depend."""

import jax

from mvar_jax.errors import InputError

PLATFORMS = ("cpu", "gpu", "tpu")

# part of jit's cache key, so that a program traced for one target is not reused for another
_target = jax.make_user_context(None)


def compiling_for(platform: str):
    """Return a context in which `current_platform()` is `platform`, to compile for a machine that is not here."""
    if platform not in PLATFORMS:
        expected = f"one of {', '.join(PLATFORMS)}"
        raise InputError(
            f"platform must be {expected}, got {platform!r}", field="platform", given=platform, expected=expected
        )
    return _target(platform)


def current_platform() -> str:
    """Return cpu, gpu (CUDA or ROCm) or tpu: of `compiling_for` if it is active, else of jax's default device."""
    if _target.value is not None:
        return _target.value
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # missing from the stubs of jax 0.10
    platform = device if isinstance(device, str) else getattr(device, "platform", None)
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
