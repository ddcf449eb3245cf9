"""The folder of a run's checkpoints: how Orbax commits a step there, and which steps are complete.

On a file system Orbax renames a complete step. An object store has no rename: there Orbax writes a step in place and
its file `commit_success.txt` last. Orbax reaches a store through `StorePath`, which is registered with epath, and the
arrays' bytes go through tensorstore's own drivers, so nothing is staged on this machine.
"""

import os
from pathlib import Path

import orbax.checkpoint as ocp

from mvar_jax.checkpoints.quiet import quiet_orbax
from mvar_jax.files.paths import as_path, is_store

_CHECKPOINT_FOLDER = "checkpoints"
_DAMAGED = ".damaged"


def checkpoint_folder(workdir: str | os.PathLike) -> Path:
    """Return the folder of a run's checkpoints. Raises InputError if the workdir's storage cannot be reached."""
    path = as_path(workdir, "workdir")
    return (path if is_store(path) else path.absolute()) / _CHECKPOINT_FOLDER


def atomicity_of(path: Path) -> ocp.options.AtomicityOptions:
    """Return how Orbax commits what it writes to a path."""
    mode = ocp.options.AtomicityMode
    return ocp.options.AtomicityOptions(mode=mode.COMMIT_FILE if is_store(path) else mode.ATOMIC_RENAME)


def unfinished(folder: Path, step: int) -> Path:
    """Return where Orbax writes a step until it is complete."""
    options = atomicity_of(folder)
    cls = ocp.path.atomicity_defaults.get_default_temporary_path_class(folder, atomicity_options=options)
    return cls.from_final(folder / str(step)).get()


def list_steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints in order; make and change nothing."""
    names = ocp.path.step.standard_name_format(atomicity_options=atomicity_of(folder))
    with quiet_orbax():
        return sorted(found.step for found in names.find_all(folder))


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; return where it is now."""
    aside = folder / f"{step}{_DAMAGED}"
    number = 1
    while aside.exists():
        number += 1
        aside = folder / f"{step}{_DAMAGED}{number}"
    (folder / str(step)).rename(aside)
    return aside
