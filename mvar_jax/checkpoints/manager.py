"""Checkpoints of a run, weight trees of a model directory and the configuration a workdir belongs to.

Everything is written under another name and renamed when complete, so a kill at any moment leaves the
previous state readable. Orbax does not notice changed bytes inside an array, hence the checksums.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from mvar_jax.checkpoints.best import Scores
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.atomic import temporary_path, write_atomically

CHECKPOINT_FOLDER = "checkpoints"
CHECKSUM_FILE = "checksums.json"
# Orbax stamps the second when it commits, so its bytes are not final when the checksums are taken.
_UNSUMMED_FILES = (CHECKSUM_FILE, "_CHECKPOINT_METADATA")

# Orbax narrates every save through absl, and repeats as tracebacks the errors that it raises anyway.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

# Orbax lets every replica write its share of an array. Cutting it compiles a program for every shape, seconds of a
# small model's start, so small arrays are left whole to the first replica.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**22), override=True
)


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP/{params,ema,optimizer,meta}`.

    Saving is asynchronous; the state may be donated as soon as `save` returns. What a killed save left
    behind is never taken for a checkpoint, and is removed here.

    Raises:
      InputError: the folder cannot be made or read.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self._folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
        self._saving_step: int | None = None
        self._scores = Scores(self._folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), self._scores]),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise InputError("workdir", str(workdir), f"a writable directory ({shorten(error)})") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, *_):
        # A second Ctrl-C must not wait for a save; the unfinished one is ignored by the next run.
        if error_type and issubclass(error_type, KeyboardInterrupt):
            return
        try:
            self.close()
        except Exception:  # of a failed save, again
            if error_type is None:
                raise

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def is_best(self, score: float) -> bool:
        """Whether a score (more is better) beats those of all checkpoints there are."""
        return self._scores.is_best(score, self._manager.all_steps())

    def add_score(self, step: int, score: float) -> None:
        """From now on the checkpoint with the highest score is kept beside the newest."""
        self._scores.add(step, score, self._manager.all_steps())

    def save(self, state: Any, meta: dict) -> None:
        """Starts writing `state` as the checkpoint of its own step; `meta` is any JSON object."""
        step = int(state.step)
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items_of(state).items()}
        self.wait()
        self._saving_step = step
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, abstract_state: Any) -> Any:
        """The newest checkpoint, placed as the ShapeDtypeStructs (with shardings) of `abstract_state` say.

        Raises:
          InputError: there is none, it is damaged, or it holds other arrays than `abstract_state`.
        """
        step = self.latest_step()
        if step is None:
            raise InputError("workdir", str(self._folder.parent), "a directory with a checkpoint")
        folder = self._folder / str(step)
        restored = {name: _read_item(folder, name, abstract) for name, abstract in _items_of(abstract_state).items()}
        rest = restored["optimizer"]
        return dataclasses.replace(
            abstract_state,
            step=rest["step"],
            params=restored["params"],
            ema=restored.get("ema"),
            opt_state=rest["opt_state"],
            extra=rest["extra"],
        )

    def wait(self) -> None:
        """Returns when the last `save` is on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _write_checksums(self) -> None:
        # Orbax calls this when all items are written and before it renames STEP.SUFFIX to STEP, so that
        # the checksums become visible together with what they are of.
        for path in self._folder.glob(f"{self._saving_step}.*"):
            _write_checksums(path)


def restore_weights(workdir: str | os.PathLike, step: int | None = None, prefer_ema: bool = True) -> Any:
    """The weights of a checkpoint (the newest by default) as float arrays on the default device.

    Neither the optimizer's state nor a description of the model is needed or read.

    Raises:
      InputError: no checkpoint there, no such step, or a damaged one.
    """
    folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
    steps = _list_steps(folder)
    if not steps:
        raise InputError("checkpoint", str(workdir), "a directory with a checkpoint in it")
    if step is not None and step not in steps:
        raise InputError("step", step, f"one of {', '.join(map(str, steps))}, the checkpoints in {workdir}")
    folder = folder / str(steps[-1] if step is None else step)
    # a lost average must not pass for a run that kept none
    has_ema = (folder / "ema").is_dir() or any(name.startswith("ema/") for name in _read_sums(folder))
    return _read_item(folder, "ema" if prefer_ema and has_ema else "params")


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes a tree of arrays of this process as the directory `path`, replacing what is there.

    Of several processes the first writes; the others do not wait.
    """
    if jax.process_index():
        return
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = temporary_path(path), temporary_path(path.with_name(f"{path.name}.old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="save_tree")
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        checkpointer.save(fresh, jax.tree.map(np.asarray, tree))
    _write_checksums(fresh)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def load_tree(path: str | os.PathLike) -> Any:
    """What `save_tree` wrote: nested dicts of arrays on the default device.

    Raises:
      InputError: no such directory, or a damaged one.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise InputError("checkpoint", str(path), "a directory of saved weights")
    if damage := _find_damage(path):
        raise _unreadable(path, damage)
    return _read_tree(path)


def _items_of(state: Any) -> dict[str, Any]:
    rest = {"opt_state": state.opt_state, "extra": state.extra, "step": state.step}
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, **ema, "optimizer": rest}


def _list_steps(folder: Path) -> list[int]:
    # Orbax renames a step to its bare number when it is complete.
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def _read_item(folder: Path, name: str, abstract: Any = None) -> Any:
    if not (folder / name).is_dir():
        raise _unreadable(folder, f"it has no {name}")
    if damage := _find_damage(folder, f"{name}/"):
        raise _unreadable(folder, damage)
    return _read_tree(folder / name, abstract)


def _read_tree(folder: Path, abstract: Any = None) -> Any:
    """As `abstract` says, or all there is on the default device."""
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            if abstract is None:
                sharding = SingleDeviceSharding(jax.local_devices()[0])
                abstract = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored
                )
            elif difference := _find_difference(stored, abstract):
                raise _unreadable(folder, difference)
            return checkpointer.restore(folder, args=ocp.args.StandardRestore(abstract))
    except InputError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever their layers raise
        raise _unreadable(folder, shorten(error)) from error


def _find_difference(stored: Any, abstract: Any) -> str | None:
    # Orbax would convert other dtypes silently, and its own messages span many lines.
    stored, wanted = _describe_leaves(stored), _describe_leaves(abstract)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            return f"{name} is {stored.get(name, 'absent')}, of this model {wanted.get(name, 'absent')}"
    return None


def _describe_leaves(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name_of(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _write_checksums(folder: Path) -> None:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in _UNSUMMED_FILES)
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in sorted(files)}
    write_atomically(folder / CHECKSUM_FILE, json.dumps(sums, indent=0))


def _read_sums(folder: Path) -> dict[str, int]:
    """File name -> checksum. Raises InputError where the list is missing or unreadable."""
    try:
        return json.loads((folder / CHECKSUM_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, f"{CHECKSUM_FILE}: {shorten(error)}") from None


def _find_damage(folder: Path, prefix: str = "") -> str | None:
    """What is wrong with the files whose names begin with `prefix`, in a few words."""
    for name, value in _read_sums(folder).items():
        if not name.startswith(prefix):
            continue
        try:
            is_whole = _checksum(folder / name) == value
        except OSError:
            return f"{name} is missing"
        if not is_whole:
            return f"{name} is damaged"
    return None


def _unreadable(folder: Path, reason: str) -> InputError:
    return InputError("checkpoint", str(folder), f"a readable checkpoint of this model ({reason})")
