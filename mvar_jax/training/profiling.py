"""Traces of some steps by JAX's profiler, for TensorBoard or Perfetto."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from mvar_jax.errors import InputError
from mvar_jax.files.directories import local_folder

PROFILE_FOLDER = "profile"


def check_profile_steps(profile_steps: tuple[int, ...], num_steps: int) -> None:
    """Raise InputError unless they are () or two increasing steps, the first one a step of the run.

    num_steps: length of the run; 0 if it is not known yet.
    """
    if not profile_steps:
        return
    expected = "() or (first step, end) such as (10, 15)"
    if num_steps:
        expected += f", the first one below num_steps={num_steps}"
    is_pair = len(profile_steps) == 2 and 0 <= profile_steps[0] < profile_steps[1]
    if not is_pair or (num_steps and profile_steps[0] >= num_steps):
        words = f"config.profile_steps must be {expected}, got {profile_steps!r}"
        raise InputError(words, field="config.profile_steps", given=profile_steps, expected=expected)


class Profiler:
    """A profiler that records the steps first .. end - 1 in workdir/profile, nothing if `profile_steps` is ()."""

    def __init__(self, workdir: Path, profile_steps: tuple[int, ...]):
        self._folder, self._recorded = workdir / PROFILE_FOLDER, contextlib.ExitStack()
        self._first, self._end = profile_steps or (0, 0)
        self._is_recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_):
        self._stop()

    def at_boundary(self, step: int, finish: Callable[[], None]) -> None:
        """Start or stop recording before `step` is dispatched; `finish` waits for the steps before it."""
        is_due = self._first <= step < self._end
        if is_due == self._is_recording:
            return
        finish()
        if not is_due:
            self._stop()
            return
        jax.profiler.start_trace(str(self._recorded.enter_context(local_folder(self._folder))))
        self._is_recording = True

    def _stop(self) -> None:
        if self._is_recording:
            self._is_recording = False
            with self._recorded:  # the profiler writes the trace when it stops
                jax.profiler.stop_trace()
