"""Checkpoints of a run."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from mvar_jax.checkpoints.array_handler import tree_handler
from mvar_jax.checkpoints.best import Scores, read_scores
from mvar_jax.checkpoints.checksums import DamagedError, check_files, error_fields, has_item, write_checksums
from mvar_jax.checkpoints.preemption import UnaskingManager
from mvar_jax.checkpoints.quiet import quiet_orbax
from mvar_jax.checkpoints.steps import atomicity_of, checkpoint_folder, list_steps, set_aside, unfinished
from mvar_jax.checkpoints.trees import TREE_FILE, read_item
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.json_files import read_json
from mvar_jax.processes import group

_META = "meta"
_META_FILE = "meta/metadata"


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP/{params,ema,optimizer,meta}`, kept by Orbax.

    Saving is asynchronous; the state may be donated as soon as `save` returns, after the copy from the devices to the
    host. Remains of a killed save are never taken for a checkpoint, and are removed here. Every process of a run
    makes the same calls.

    Args:
      workdir: of the run.
      keep: number of newest checkpoints to keep; the best one is kept too.

    Raises InputError if the folder cannot be made or read.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self._workdir, self._folder = workdir, checkpoint_folder(workdir)
        self._saving: tuple[int, list[str]] = (0, [])
        # all processes must keep the same checkpoints, so they take what the first one reads
        here = group.current()
        found, measured_by = read_scores(self._folder) if here.index == 0 else ({}, None)
        scores, measured_by = here.gather("scores", [list(found.items()), measured_by])[0]
        self._scores = Scores(self._folder, dict(scores), measured_by)
        self._thread = ThreadPoolExecutor(1)  # writes the scores
        self._written_scores: Future[None] = self._thread.submit(lambda: None)
        with contextlib.ExitStack() as quiet:
            quiet.enter_context(quiet_orbax())
            try:
                self._manager = UnaskingManager(
                    self._folder, options=self._options(keep), handler_registry=_handler_registry()
                )
            except OSError as error:
                words = f"workdir {workdir} cannot be written: {shorten(error)}"
                raise InputError(
                    words, field="workdir", given=str(workdir), expected="a writable directory"
                ) from error
            # saves run in the background, so Orbax stays quiet until `close`
            self._quiet = quiet.pop_all()

    def _options(self, keep: int) -> ocp.CheckpointManagerOptions:
        return ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), self._scores]),
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            atomicity_options=atomicity_of(self._folder),
            # the training loop would wait while Orbax asks the storage whether the new step exists
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
        )

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

    def measure_by(self, measured_by: str) -> str | None:
        """Say what the scores that follow are measured by; see `Scores.measure_by`."""
        return self._scores.measure_by(measured_by)

    def is_best(self, score: float) -> bool:
        """Return whether a score (more is better) beats those of all checkpoints."""
        return self._scores.is_best(score, self._manager.all_steps())

    def add_score(self, step: int, score: float) -> None:
        """Note a step's score: the checkpoint with the highest is kept in addition to the newest.

        It is written in the background, after the checkpoint.
        """
        self._scores.add(step, score, self._manager.all_steps())
        self._start_writing_scores()

    def forget_scores_after(self, step: int) -> None:
        """Forget the scores of later steps: a run that resumes from `step` saves them again."""
        if self._scores.forget_after(step):
            self._start_writing_scores()

    def drop_newest(self) -> int:
        """Remove the newest checkpoint if there is an older one, and return the step of the newest one left."""
        *older, newest = sorted(self._manager.all_steps())
        if not older:
            return newest
        self._manager.delete(newest)
        self.forget_scores_after(older[-1])
        return older[-1]

    def save(self, state: Any, meta: dict) -> None:
        """Start writing `state` as the checkpoint of its own step; `meta` is any JSON object.

        Raises what the last save raised.
        """
        self.wait()
        step, items = int(state.step), _items_of(state)
        self._saving = step, [*(f"{name}/{TREE_FILE}" for name in items), _META_FILE]
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        composite = ocp.args.Composite(**args, **{_META: ocp.args.JsonSave(meta)})
        self._manager.save(step, args=composite, force=True)

    def restore(self, abstract_state: Any, strict: bool = False, say: Callable[[str], None] = print) -> Any:
        """Load the newest checkpoint that is not damaged.

        A damaged one is set aside, so that its step can be saved again. Without a good one nothing is changed.

        Args:
          abstract_state: ShapeDtypeStructs whose shardings say what each process reads.
          strict: refuse a damaged newest checkpoint instead of using an older one.
          say: called in the first process with a sentence on each damaged checkpoint.

        Raises:
          InputError: there is no checkpoint or no good one, the storage cannot be reached, or the arrays differ from
            `abstract_state`.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise _no_checkpoint("workdir", self._workdir)
        damage: list[DamagedError] = []
        for step in steps:
            try:
                state = _restore_together(self._folder / str(step), abstract_state)
            except DamagedError as error:
                damage.append(error)
                if strict:
                    break
                continue
            if damage:
                self._set_aside(dict(zip(steps, damage, strict=False)), step, say)
            return state
        raise damage[0]

    def read_meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` that a checkpoint was saved with; `restore` has checked the file."""
        return read_json(self._folder / str(step) / _META_FILE, dict[str, Any])

    def wait(self) -> None:
        """Return when the last `save` is stored and visible; raise what it raised."""
        self._manager.wait_until_finished()
        self._written_scores.result()

    def close(self) -> None:
        """Wait for the last `save` and release the folder."""
        with self._quiet, self._thread:
            try:
                self._written_scores.result()
            finally:
                self._manager.close()

    def _write_checksums(self) -> None:
        # Orbax calls this in the first process when all items are written, and before it makes the step visible.
        step, names = self._saving
        write_checksums(unfinished(self._folder, step), names)

    def _start_writing_scores(self) -> None:
        if group.current().index == 0:
            self._written_scores = self._thread.submit(self._write_scores)

    def _write_scores(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # raised by `wait` too; a score without its checkpoint does not count
            return
        self._scores.write()

    def _set_aside(self, damage: dict[int, DamagedError], good_step: int, say: Callable[[str], None]) -> None:
        here = group.current()
        if here.index == 0:
            for step, error in damage.items():
                aside = set_aside(self._folder, step)
                say(f"{error}; it is now {aside}; resuming from step {good_step} instead")
        here.wait_for_all("damaged checkpoints")
        self._manager.reload()


def restore_weights(workdir: str | os.PathLike, step: int | None = None, prefer_ema: bool = True) -> Any:
    """Load the weights of a checkpoint (the newest by default) as float arrays on the default device.

    Neither the optimizer's state nor a description of the model is needed or read. A damaged checkpoint is refused,
    even if it was not named: which weights a model has must not depend on damage. The error names the newest good
    one.

    Raises InputError if there is no checkpoint, no such step, or a damaged one.
    """
    folder = checkpoint_folder(workdir)
    steps = list_steps(folder)
    if not steps:
        raise _no_checkpoint("checkpoint", workdir)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise InputError(
            f"{workdir} has no checkpoint of step {step}, only of {there}", field="step", given=step, expected=there
        )
    given, step = step, steps[-1] if step is None else step
    try:
        return _read_weights(folder / str(step), prefer_ema)
    except DamagedError as error:
        if not (folder / str(step)).exists():  # by the run, which has newer ones
            if given is None:
                return restore_weights(workdir, None, prefer_ema)
            words = f"{workdir} no longer has its checkpoint of step {step}: it was removed meanwhile, try again"
            raise InputError(words, field="step", given=step, expected="a checkpoint that stays") from None
        for older in reversed([other for other in steps if other < step]):
            try:
                _read_weights(folder / str(older), prefer_ema)
            except InputError:
                continue
            words = f"{error}; the newest good one is of step {older}: move {folder / str(step)} away to load it"
            raise DamagedError(words, field=error.field, given=error.given, expected=error.expected) from error
        raise


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a workdir holds a checkpoint; makes and changes nothing."""
    return bool(list_steps(checkpoint_folder(workdir)))


def _read_weights(folder: Path, prefer_ema: bool) -> Any:
    # a lost average must not pass for a run that kept none
    return read_item(folder, "ema" if prefer_ema and has_item(folder, "ema") else "params")


def _restore_together(folder: Path, abstract_state: Any) -> Any:
    """Restore a checkpoint; raise DamagedError in every process if one meets damage. Other errors end the run."""
    state, damage = None, None
    try:
        state = _restore(folder, abstract_state)
    except DamagedError as error:
        damage = error
    for words in group.current().gather(f"damage of {folder.name}", damage and str(damage)):
        if words:
            raise damage or DamagedError(words, **error_fields(folder))
    return state


def _restore(folder: Path, abstract_state: Any) -> Any:
    items = _items_of(abstract_state)
    with ThreadPoolExecutor() as threads:  # an object store answers slowly, and Orbax asks one thing after the other
        checked = threads.submit(check_files, folder, _META)
        trees = threads.map(lambda name: read_item(folder, name, items[name]), items)
        restored = dict(zip(items, trees, strict=True))
        checked.result()
    rest = restored["optimizer"]
    return dataclasses.replace(
        abstract_state,
        step=rest["step"],
        params=restored["params"],
        ema=restored.get("ema"),
        opt_state=rest["opt_state"],
        extra=rest["extra"],
    )


def _handler_registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, tree_handler())
    return registry


def _items_of(state: Any) -> dict[str, Any]:
    rest = {"opt_state": state.opt_state, "extra": state.extra, "step": state.step}
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, **ema, "optimizer": rest}


def _no_checkpoint(field: str, workdir: str | os.PathLike) -> InputError:
    words = f"{workdir} has no checkpoint in it"
    return InputError(words, field=field, given=str(workdir), expected="a directory with a checkpoint")
