"""What a run keeps: checkpoints of weights that are proven good, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.errors import RunError, shorten
from mvar_jax.training.state import all_finite


class Saver:
    """Saves the states of a run, and knows what is on disk.

    A step whose loss or gradient was not finite changes no weights, but nobody knows whether they or the batch are to
    blame until a later step or an evaluation is finite. Until then nothing is saved, and a save that was due is owed.

    Attributes:
      saved_step: step of the newest checkpoint, None without one.
      is_owed: whether a save was due and could not be made.
    """

    def __init__(self, workdir: Path, checkpoints: Checkpoints, config_json: dict, saved_step: int | None):
        self._workdir, self._checkpoints, self._config_json = workdir, checkpoints, config_json
        self.saved_step, self.is_owed = saved_step, False

    def save(self, state: Any, step: int, is_good: bool, more_meta: Callable[[], dict[str, Any]] = dict) -> None:
        """Start saving the state unless its step is on disk. Every process must call this.

        Args:
          state: the state after `step` updates.
          step: its step.
          is_good: whether the last step or an evaluation of these weights was finite.
          more_meta: returns what the checkpoint's meta data hold beside the step and the config.

        Raises RunError if this save or the previous one, which ran in the background, failed.
        """
        if step == (self.saved_step or 0):  # already on disk, or step 0, a function of the seed alone
            return
        assert int(state.step) == step, "a step counts even if its update was skipped"
        reason = None if is_good else "the loss or the gradient of the last step was not finite"
        if reason is None and not all_finite(state):
            reason = "its weights or statistics are not finite"
        if reason is not None:
            if not self.is_owed:
                say(f"step {step} is not saved: {reason}; {self.kept()}")
            self.is_owed = True
            return
        try:
            self._checkpoints.save(state, {"step": step, "config": self._config_json, **more_meta()})
        except Exception as error:
            raise self._error(error) from error
        self.saved_step, self.is_owed = step, False

    def wait(self) -> None:
        """Return when the last save is on disk. Raises RunError if it failed."""
        try:
            self._checkpoints.wait()
        except Exception as error:
            raise self._error(error) from error

    def drop_poisoned(self, first_bad_step: int) -> None:
        """Remove the checkpoint whose weights gave only losses that were not finite, if there is an older one."""
        if self.saved_step == first_bad_step:
            self.wait()
            self.saved_step = self._checkpoints.drop_newest()
            self.wait()

    def kept(self) -> str:
        """Return what is on disk, as the end of a sentence."""
        if self.saved_step is None:
            return f"{self._workdir} has no checkpoint yet"
        return f"{self._workdir} keeps the checkpoint of step {self.saved_step}"

    def _error(self, error: Exception) -> RunError:
        return RunError(f"a checkpoint could not be written to {self._workdir}: {shorten(error)}")


def check_first(state: Any, workdir: Path, saved_step: int | None) -> None:
    """Raise RunError if the state that a run begins with is not finite.

    Also compiles, before the first step, the check that every save makes.

    Args:
      state: the state.
      workdir: the run's folder.
      saved_step: step of the checkpoint that it comes from; None for initial weights.
    """
    if all_finite(state):
        return
    if saved_step is None:
        raise RunError("the initial weights are not finite; let config.init_from name others")
    raise RunError(
        f"the checkpoint of step {saved_step} in {workdir} holds numbers that are not finite; move it away to resume "
        "from an older one"
    )


def say(line: str) -> None:
    """Print a line of the run, once for all its processes."""
    if jax.process_index() == 0:
        print(line, flush=True)
