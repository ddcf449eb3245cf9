"""Set-up of a process before JAX starts: the other processes of its run, the cache of compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

from mvar_jax.errors import InputError

OFF = "off"
AUTO = "auto"


def add_machine_arguments(parser) -> None:
    """Add --distributed and --compilation_cache."""
    parser.add_argument(
        "--distributed",
        default=OFF,
        metavar="off|auto|HOST:PORT,NUM,INDEX",
        help="join the other processes of the run: by Slurm, a TPU slice, Open MPI or the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (auto), or as given; off: alone (default)",
    )
    parser.add_argument(
        "--compilation_cache",
        default=AUTO,
        metavar="auto|off|DIR",
        help="folder that keeps compiled programs between runs (auto: JAX_COMPILATION_CACHE_DIR if set, else "
        "~/.cache/mvar_jax, by version and machine)",
    )


def set_up_machine(distributed: str, compilation_cache: str) -> None:
    """Set up processes and cache; call before anything touches a device. Raises InputError for unusable options."""
    start_distributed(distributed)
    use_compilation_cache(compilation_cache)


def start_distributed(option: str) -> None:
    """Join the other processes as `--distributed` says. Raises InputError if that fails."""
    if option == OFF:
        return
    import jax

    try:
        jax.distributed.initialize(**parse_distributed(option, os.environ))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        words = f"--distributed={option}: the processes of the run did not meet: {reason}"
        raise InputError(words, field="distributed", given=option, expected="processes that can meet") from None


def wait_for_all(name: str) -> None:
    """Return when every process of the run has called this with the same name."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def parse_distributed(option: str, environment) -> dict:
    """Return the arguments of `jax.distributed.initialize`; {} lets JAX detect the cluster itself."""
    if option == AUTO:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given = [environment.get(name) for name in names]
        if not all(given):
            return {}
        option = ",".join(given)
    parts = option.split(",")
    is_complete = len(parts) == 3 and ":" in parts[0] and parts[1].isdecimal() and parts[2].isdecimal()
    if not is_complete or int(parts[2]) >= int(parts[1]):
        expected = "off, auto, or HOST:PORT,NUM,INDEX such as 10.0.0.1:1234,2,0"
        words = f"--distributed must be {expected}, got {option}"
        raise InputError(words, field="distributed", given=option, expected=expected)
    return {"coordinator_address": parts[0], "num_processes": int(parts[1]), "process_id": int(parts[2])}


def use_compilation_cache(option: str) -> None:
    """Set JAX's persistent cache. If the folder cannot be made, JAX warns and the run continues."""
    import jax

    if option == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif option != AUTO:
        jax.config.update("jax_compilation_cache_dir", str(Path(option).absolute()))
    elif not jax.config.jax_compilation_cache_dir:  # set by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(default_cache_folder(os.environ)))


def default_cache_folder(environment) -> Path:
    """Return a folder for this version of JAX and kind of processor: CPU programs do not run on other kinds."""
    import jaxlib

    base = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mvar_jax" / f"jax-{jaxlib.__version__}-{platform.machine()}-{_processor_digest()}"


def _processor_digest() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:8]
