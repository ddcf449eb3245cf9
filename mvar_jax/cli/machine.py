"""What a process sets up before JAX starts: the other processes of its run, the cache of compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

from mvar_jax.errors import InputError

OFF = "off"
AUTO = "auto"


def add_machine_arguments(parser) -> None:
    """--distributed and --compilation_cache."""
    parser.add_argument(
        "--distributed",
        default=OFF,
        metavar="off|auto|HOST:PORT,NUM,INDEX",
        help="join the other processes of the run: as Slurm, a TPU slice, Open MPI or the JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID variables say (auto), or as given; off (default): one process",
    )
    parser.add_argument(
        "--compilation_cache",
        default=AUTO,
        metavar="auto|off|DIR",
        help="where compiled programs are kept between runs (auto: ~/.cache/mvar_jax, by version and machine; "
        "JAX_COMPILATION_CACHE_DIR wins where it is set)",
    )


def set_up_machine(distributed: str, compilation_cache: str) -> None:
    """Call before anything touches a device. Raises InputError for options that cannot be meant."""
    start_distributed(distributed)
    use_compilation_cache(compilation_cache)


def start_distributed(option: str) -> None:
    """`jax.distributed.initialize` as `--distributed` asks. Raises InputError where that fails."""
    if option == OFF:
        return
    import jax

    try:
        jax.distributed.initialize(**parse_distributed(option, os.environ))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError("distributed", option, f"a run whose processes can meet ({reason})") from None


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def parse_distributed(option: str, environment) -> dict:
    """Arguments of `jax.distributed.initialize`; {} leaves them to JAX's own detection of the cluster."""
    if option == AUTO:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given = [environment.get(name) for name in names]
        if not all(given):
            return {}
        option = ",".join(given)
    parts = option.split(",")
    is_complete = len(parts) == 3 and ":" in parts[0] and parts[1].isdecimal() and parts[2].isdecimal()
    if not is_complete or int(parts[2]) >= int(parts[1]):
        raise InputError("distributed", option, "off, auto, or HOST:PORT,NUM,INDEX as 10.0.0.1:1234,2,0")
    return {"coordinator_address": parts[0], "num_processes": int(parts[1]), "process_id": int(parts[2])}


def use_compilation_cache(option: str) -> None:
    """Sets JAX's persistent cache. A folder that cannot be made is reported by JAX and does not stop a run."""
    import jax

    if option == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif option != AUTO:
        jax.config.update("jax_compilation_cache_dir", str(Path(option).absolute()))
    elif not jax.config.jax_compilation_cache_dir:  # set by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(default_cache_folder(os.environ)))


def default_cache_folder(environment) -> Path:
    """Its own for each version of JAX and each kind of processor: CPU programs run only where they were made."""
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
