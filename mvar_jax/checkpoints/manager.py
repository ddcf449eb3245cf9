"""Checkpoints of a run."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from mvar_jax.checkpoints.best import Scores
from mvar_jax.checkpoints.trees import quiet_orbax, read_checksums, read_item, write_checksums
from mvar_jax.errors import InputError, shorten

CHECKPOINT_FOLDER = "checkpoints"
# Orbax lets every replica write its share of an array. Cutting it compiles a program for every shape, seconds of a
# small model's start, so smaller arrays are left whole to the first replica.
_LEAST_CUT_BYTES = 2**22


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP/{params,ema,optimizer,meta}`.

    Saving is asynchronous; the state may be donated as soon as `save` returns. Remains of a killed save are never
    taken for a checkpoint, and are removed here.

    Raises InputError if the folder cannot be made or read.
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
        with contextlib.ExitStack() as quiet:
            quiet.enter_context(quiet_orbax())
            try:
                self._manager = ocp.CheckpointManager(
                    self._folder, options=options, handler_registry=_handler_registry()
                )
            except OSError as error:
                words = f"workdir {workdir} cannot be written: {shorten(error)}"
                raise InputError(
                    words, field="workdir", given=str(workdir), expected="a writable directory"
                ) from error
            # saves run in the background, so Orbax stays quiet until `close`
            self._quiet = quiet.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, *_):
        # A second Ctrl-C must not wait for a save, nor an error for processes that may not come to the save's
        # barriers. The next run ignores an unfinished save.
        if error_type and (issubclass(error_type, KeyboardInterrupt) or jax.process_count() > 1):
            return
        try:
            self.close()
        except Exception:  # the error of a failed save, raised again
            if error_type is None:
                raise

    def latest_step(self) -> int | None:
        """Return the newest checkpoint's step, None if there is no checkpoint."""
        return self._manager.latest_step()

    def is_best(self, score: float) -> bool:
        """Return whether a score (more is better) beats those of all checkpoints."""
        return self._scores.is_best(score, self._manager.all_steps())

    def add_score(self, step: int, score: float) -> None:
        """Note a step's score: the checkpoint with the highest is kept in addition to the newest."""
        self._scores.add(step, score, self._manager.all_steps())

    def drop_newest(self) -> int:
        """Remove the newest checkpoint if there is an older one, and return the step of the newest one left."""
        *older, newest = sorted(self._manager.all_steps())
        if not older:
            return newest
        self._manager.delete(newest)
        return older[-1]

    def save(self, state: Any, meta: dict) -> None:
        """Start writing `state` as the checkpoint of its own step; `meta` is any JSON object."""
        step = int(state.step)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items_of(state).items()}
        self.wait()
        self._saving_step = step
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, abstract_state: Any) -> Any:
        """Load the newest checkpoint, placed as the ShapeDtypeStructs (with shardings) of `abstract_state` say.

        Raises InputError if there is no checkpoint, or it is damaged, or its arrays differ from `abstract_state`.
        """
        step = self.latest_step()
        if step is None:
            raise _no_checkpoint("workdir", self._folder.parent)
        folder = self._folder / str(step)
        restored = {name: read_item(folder, name, abstract) for name, abstract in _items_of(abstract_state).items()}
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
        """Return when the last `save` is on disk; raise what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last `save` and release the folder."""
        with self._quiet:
            self._manager.close()

    def _write_checksums(self) -> None:
        # Orbax calls this when all items are written and before it renames STEP.SUFFIX to STEP: the checksums become
        # visible together with their files.
        for path in self._folder.glob(f"{self._saving_step}.*"):
            write_checksums(path)


def restore_weights(workdir: str | os.PathLike, step: int | None = None, prefer_ema: bool = True) -> Any:
    """Load the weights of a checkpoint (the newest by default) as float arrays on the default device.

    Neither the optimizer's state nor a description of the model is needed or read. Raises InputError if there is no
    checkpoint, no such step, or a damaged one.
    """
    folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
    steps = _list_steps(folder)
    if not steps:
        raise _no_checkpoint("checkpoint", Path(workdir))
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise InputError(
            f"{workdir} has no checkpoint of step {step}, only of {there}", field="step", given=step, expected=there
        )
    folder = folder / str(steps[-1] if step is None else step)
    # a lost average must not pass for a run that kept none
    has_ema = (folder / "ema").is_dir() or any(name.startswith("ema/") for name in read_checksums(folder))
    return read_item(folder, "ema" if prefer_ema and has_ema else "params")


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a workdir holds a checkpoint; makes and changes nothing."""
    return bool(_list_steps(Path(workdir).absolute() / CHECKPOINT_FOLDER))


def _handler_registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    array_handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_CUT_BYTES)
    types = ((jax.Array, array_handler), (np.ndarray, ocp.type_handlers.NumpyHandler()))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*types)
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, handler)
    return registry


def _items_of(state: Any) -> dict[str, Any]:
    rest = {"opt_state": state.opt_state, "extra": state.extra, "step": state.step}
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, **ema, "optimizer": rest}


def _list_steps(folder: Path) -> list[int]:
    # Orbax renames a step to its bare number when it is complete.
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def _no_checkpoint(field: str, workdir: Path) -> InputError:
    words = f"{workdir} has no checkpoint in it"
    return InputError(words, field=field, given=str(workdir), expected="a directory with a checkpoint")
