"""Options of the machine: the other processes of a run, and the cache of compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

from mvar_jax.files.paths import as_path
from mvar_jax.processes.join import AUTO, OFF


def add_machine_arguments(parser) -> None:
    """Add --distributed and --compilation_cache."""
    parser.add_argument(
        "--distributed",
        default=OFF,
        metavar="off|auto|HOST:PORT,NUM,INDEX",
        help="join the other processes of the run: by Slurm, a TPU slice, Open MPI or the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (auto), or as given; off: alone (default)",
    )
    add_cache_argument(parser)


def add_cache_argument(parser) -> None:
    """Add --compilation_cache."""
    parser.add_argument(
        "--compilation_cache",
        default=AUTO,
        metavar="auto|off|DIR",
        help="folder that keeps compiled programs between runs (auto: JAX_COMPILATION_CACHE_DIR if set, else "
        "~/.cache/mvar_jax, by version and machine)",
    )


def print_machine(mesh=None) -> None:
    """Print the processes of the run, their devices and the mesh over all of them, if there is one."""
    import jax

    from mvar_jax.processes.cluster import describe

    if jax.process_index() == 0:
        print(describe(jax.devices(), mesh.shape if mesh else {}), flush=True)


def use_compilation_cache(option: str) -> None:
    """Set JAX's persistent cache. If the folder cannot be made, JAX warns and the run continues."""
    import jax

    if option == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif option != AUTO:
        jax.config.update("jax_compilation_cache_dir", str(as_path(option, "compilation_cache").absolute()))
    elif named := jax.config.jax_compilation_cache_dir:  # set by JAX_COMPILATION_CACHE_DIR
        as_path(named, "JAX_COMPILATION_CACHE_DIR")  # a store is reached, or refused
    else:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_folder(os.environ)))


def plans_folder(option: str) -> Path | None:
    """Return the folder that keeps what `plan` compiled, beside the compiled programs; None for "off"."""
    if option == OFF:
        return None
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR") if option == AUTO else option
    if not named:
        return default_cache_folder(os.environ).parent / "plans"
    return as_path(named, "compilation_cache" if option != AUTO else "JAX_COMPILATION_CACHE_DIR").absolute() / "plans"


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
