"""Checkpoints of a run."""

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mvar_jax.checkpoints import arrays, orbax_format, trees
from mvar_jax.checkpoints.agreement import by_all, by_first
from mvar_jax.checkpoints.best import Scores, read_scores
from mvar_jax.checkpoints.index import DamagedError, Index, read_index, write_index
from mvar_jax.checkpoints.leaves import layouts_of, own_pieces
from mvar_jax.checkpoints.steps import steps_of
from mvar_jax.errors import InputError, shorten


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP/{params,ema,optimizer}`.

    Saving is asynchronous; the state may be donated as soon as `save` returns, after the copy from the devices to the
    host. Remains of a killed save are never taken for a checkpoint, and are removed here. Every process of a run
    makes the same calls.

    Args:
      workdir: of the run.
      keep: number of newest checkpoints to keep; the best one is kept too.

    Raises InputError in every process if the folder cannot be made or read.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self._workdir, self._keep = workdir, keep
        self._steps = steps_of(workdir)
        self._background: threading.Thread | None = None
        self._error: BaseException | None = None
        # All processes must decide alike, so what they know comes from the first one and from their own calls, never
        # from how far their background is.
        self._known, scores = by_first("list of checkpoints", self._clean)
        self._scores = Scores(self._steps.folder, {step: score for step, score in scores})

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, *_):
        # A second Ctrl-C must not wait for a save, nor an error for processes that will not come to the save's end.
        # The next run ignores an unfinished save.
        if error_type and (issubclass(error_type, KeyboardInterrupt) or jax.process_count() > 1):
            return
        try:
            self.close()
        except Exception:  # the error of a failed save, raised again
            if error_type is None:
                raise

    def latest_step(self) -> int | None:
        """Return the newest checkpoint's step, None if there is no checkpoint."""
        return max(self._known, default=None)

    def is_best(self, score: float) -> bool:
        """Return whether a score (more is better) beats those of all checkpoints."""
        return self._scores.is_best(score, self._known)

    def add_score(self, step: int, score: float) -> None:
        """Note a step's score: the checkpoint with the highest is kept in addition to the newest.

        It is written in the background, after the checkpoint.
        """
        self._scores.add(step, score, self._known)
        if jax.process_index() == 0:
            self._start(self._scores.write)

    def drop_newest(self) -> int:
        """Remove the newest checkpoint if there is an older one, and return the step of the newest one left."""
        self.wait()
        *older, newest = sorted(self._known)
        if not older:
            return newest
        by_first("dropped checkpoint", lambda: self._steps.remove(newest))
        self._known = older
        return older[-1]

    def save(self, state: Any, meta: dict) -> None:
        """Start writing `state` as the checkpoint of its own step; `meta` is any JSON object.

        Raises what the last save raised.
        """
        step = int(state.step)
        self.wait()
        items = _items_of(state)
        index = Index({name: layouts_of(tree) for name, tree in items.items()}, meta)
        pieces = own_pieces(items)
        self._known.append(step)
        kept = {*sorted(self._known)[-self._keep :], self._scores.best_of(self._known)}
        outdated = [step for step in self._known if step not in kept]
        self._known = [step for step in self._known if step in kept]
        self._start(lambda: self._write(step, index, pieces, outdated))

    def restore(self, abstract_state: Any, strict: bool = False, say: Callable[[str], None] = print) -> Any:
        """Load the newest checkpoint that is not damaged.

        A damaged one is set aside, so that its step can be saved again. Without a good one nothing is changed.

        Args:
          abstract_state: ShapeDtypeStructs whose shardings say what each process reads.
          strict: refuse a damaged newest checkpoint instead of using an older one.
          say: called in the first process with a sentence on each damaged checkpoint.

        Raises:
          InputError: there is no checkpoint, none is good, storage cannot be reached, or the arrays differ from
            `abstract_state`.
        """
        if not self._known:
            raise _no_checkpoint("workdir", self._workdir)
        damage: list[DamagedError] = []
        for step in reversed(self._known):
            try:
                state = self._restore_together(step, abstract_state)
            except DamagedError as error:
                damage.append(error)
                if strict:
                    break
                continue
            self._set_aside(damage, step, say)
            return state
        raise damage[0]

    def wait(self) -> None:
        """Return when the last `save` is stored and visible; raise what it raised."""
        if self._background is not None:
            self._background.join()
            self._background = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the last `save`."""
        self.wait()

    def _clean(self) -> tuple[list[int], list[tuple[int, float]]]:
        """Return the steps and their scores."""
        try:
            self._steps.clean()
            return self._steps.all(), list(read_scores(self._steps.folder).items())
        except OSError as error:
            words = f"workdir {self._workdir} cannot be written: {shorten(error)}"
            raise InputError(
                words, field="workdir", given=str(self._workdir), expected="a writable directory"
            ) from error

    def _start(self, function: Callable[[], None]) -> None:
        """Call a function in the background, after all that was started before, unless that failed."""
        before = self._background

        def run() -> None:
            if before is not None:
                before.join()
            try:
                if self._error is None:
                    function()
            except BaseException as error:  # raised by `wait`
                self._error = error

        # not waited for when Python ends: what is unfinished then is ignored by the next run
        self._background = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._background.start()

    def _write(self, step: int, index: Index, pieces: list[arrays.Piece], outdated: list[int]) -> None:
        """Write this process's part; the first process completes the checkpoint when all have written theirs."""
        by_first("begin of a checkpoint", lambda: self._steps.begin(step))
        by_all("arrays of a checkpoint", lambda: arrays.write(self._steps.unfinished(step), pieces))
        by_first("commit of a checkpoint", lambda: self._commit(step, index))
        if jax.process_index() == 0:
            for old in outdated:
                self._steps.remove(old)

    def _commit(self, step: int, index: Index) -> None:
        write_index(self._steps.unfinished(step), index)
        self._steps.commit(step)

    def _restore_together(self, step: int, abstract_state: Any) -> Any:
        """Raise in every process what the first process with an error met."""
        return by_all("restored checkpoint", lambda: _restore(self._steps[step], abstract_state))

    def _set_aside(self, damage: list[DamagedError], good_step: int, say: Callable[[str], None]) -> None:
        damaged_steps = [step for step in self._known if step > good_step]
        self._known = [step for step in self._known if step <= good_step]
        if not damaged_steps:
            return
        fates = by_first("damaged checkpoints", lambda: [self._steps.set_aside(step) for step in damaged_steps])
        if jax.process_index() == 0:
            for error, fate in zip(damage, reversed(fates), strict=True):
                say(f"{error}; {fate}; resuming from step {good_step} instead")


def restore_weights(workdir: str | os.PathLike, step: int | None = None, prefer_ema: bool = True) -> Any:
    """Load the weights of a checkpoint (the newest by default) as float arrays on the default device.

    Neither the optimizer's state nor a description of the model is needed or read. A damaged checkpoint is refused,
    even if it was not named: which weights a model has must not depend on damage. The error names the newest good
    one.

    Raises InputError if there is no checkpoint, no such step, or a damaged one.
    """
    steps = steps_of(workdir)
    there = steps.all()
    if not there:
        raise _no_checkpoint("checkpoint", workdir)
    if step is not None and step not in there:
        names = ", ".join(map(str, there))
        raise InputError(
            f"{workdir} has no checkpoint of step {step}, only of {names}", field="step", given=step, expected=names
        )
    step = there[-1] if step is None else step
    try:
        return _read_weights(steps[step], prefer_ema)
    except DamagedError as error:
        for older in reversed([other for other in there if other < step]):
            try:
                _read_weights(steps[older], prefer_ema)
            except InputError:
                continue
            words = f"{error}; the newest good one is of step {older}: move {steps[step]} away to load it"
            raise DamagedError(words, field=error.field, given=error.given, expected=error.expected) from error
        raise


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Return whether a workdir holds a checkpoint; makes and changes nothing."""
    return bool(steps_of(workdir).all())


def _read_weights(folder: Path, prefer_ema: bool) -> Any:
    # a lost average must not pass for a run that kept none
    if orbax_format.is_orbax(folder):
        has_ema = orbax_format.has_item(folder, "ema")
        return orbax_format.read_item(folder, "ema" if prefer_ema and has_ema else "params")
    has_ema = "ema" in read_index(folder).items
    return trees.read_item(folder, "ema" if prefer_ema and has_ema else "params")


def _restore(folder: Path, abstract_state: Any) -> Any:
    read_item = orbax_format.read_item if orbax_format.is_orbax(folder) else trees.read_item
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


def _items_of(state: Any) -> dict[str, Any]:
    rest = {"opt_state": state.opt_state, "extra": state.extra, "step": state.step}
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, **ema, "optimizer": rest}


def _no_checkpoint(field: str, workdir: str | os.PathLike) -> InputError:
    words = f"{workdir} has no checkpoint in it"
    return InputError(words, field=field, given=str(workdir), expected="a directory with a checkpoint")
