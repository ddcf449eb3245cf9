"""The training loop. It knows tasks (steps, batches, evaluations), nothing of images or models."""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mvar_jax.checkpoints.best import Metric
from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.errors import InputError, shorten
from mvar_jax.hardware.machines import peak_flops
from mvar_jax.training.logging import MetricLog, Progress, has_line
from mvar_jax.training.profiling import Profiler, check_profile_steps
from mvar_jax.training.stopping import StopFlag
from mvar_jax.training.throughput import Throughput
from mvar_jax.training.workdir import CONFIG_FILE, check_config, hold_workdir

# Finished steps are read this much later: the device always has work queued, and yet neither batches pile
# up on it nor does a signal wait for more than a few steps.
_STEPS_AHEAD = 2
_LEAST = {"eval_every_steps": 0, "save_every_steps": 0, "picture_every_steps": -1}  # of the others 1


class RunError(RuntimeError):
    """A run that cannot go on, in one line; its last checkpoint is intact."""


class Task(Protocol):
    """What is trained. The state is a dataclass pytree with step, params, ema, opt_state and extra."""

    examples_per_step: int

    def init_state(self) -> Any:
        """Arrays placed on the mesh: a function of the seed alone."""

    def abstract_state(self) -> Any:
        """The same as ShapeDtypeStructs with shardings."""

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches of steps start_step, start_step + 1, ...: the same ones wherever it starts."""

    def train_step(self, state: Any, batch: dict[str, np.ndarray], step: int) -> tuple[Any, dict[str, jax.Array]]:
        """Dispatches one step; may donate `state`. Metrics are scalars or [S] vectors, among them
        `loss` and `is_bad` (1 where the loss was not finite)."""

    def flops_of_step(self, step: int) -> float:
        """Of the model, forward and backward, all devices together; asked only where a peak is known."""

    def evaluate(self, state: Any) -> dict[str, float | list[float]]:
        """Means over the validation data."""

    def pictures(self, state: Any) -> dict[str, np.ndarray]:
        """By name, uint8 [Y, X, 3]."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Options of the training loop.

    Attributes:
      num_steps: optimizer steps of the whole run.
      log_every_steps: steps between lines of metrics.jsonl.
      eval_every_steps: steps between evaluations; 0 evaluates only at the start and at the end.
      picture_every_steps: steps between image grids; 0 draws them only at the end, -1 never.
      save_every_steps: steps between checkpoints; 0 saves only at the end.
      keep_checkpoints: number of newest checkpoints to keep.
      max_bad_steps: steps in a row without a finite loss after which the run stops.
      keep_best: evaluation metric whose best checkpoint is kept too, as loss or psnr_db:max; "" keeps none.
      profile_steps: (first, end) of the steps that the profiler records into WORKDIR/profile; () records none.
    """

    num_steps: int
    log_every_steps: int
    eval_every_steps: int
    picture_every_steps: int
    save_every_steps: int
    keep_checkpoints: int
    max_bad_steps: int
    keep_best: str = ""
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is not int:
                continue
            value = getattr(self, field.name)
            least = _LEAST.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(field.name, value, f"a whole number of at least {least}")
        Metric.parse(self.keep_best)
        check_profile_steps(self.profile_steps)


class RunResult(NamedTuple):
    """`interrupted`: the number of the signal that ended the run early, None if it is complete."""

    step: int
    interrupted: int | None
    seconds: float


def run(
    task: Task,
    workdir: str | os.PathLike,
    settings: LoopSettings,
    config_json: dict,
    prepare: Callable[[], None] = lambda: None,
) -> RunResult:
    """Trains to `settings.num_steps`, going on from the newest checkpoint in `workdir`.

    A resumed run gives bit-equal metrics and weights. SIGINT and SIGTERM end it at a step boundary with
    a checkpoint; a second SIGINT raises KeyboardInterrupt at once. `prepare` is called once the workdir is held.

    Raises:
      InputError: the workdir is of another configuration, in use, unwritable, or its checkpoint is damaged.
      RunError: too many steps in a row without a finite loss, no more batches, or a failed save.
    """
    started_s = time.monotonic()
    workdir = Path(workdir)
    if (workdir / CONFIG_FILE).exists():
        check_config(workdir, config_json)  # before the lock file, so that a refused run leaves no trace
    with StopFlag() as stop, hold_workdir(workdir):
        check_config(workdir, config_json)
        prepare()
        with Checkpoints(workdir, settings.keep_checkpoints) as checkpoints:
            newest = checkpoints.latest_step()
            if newest is not None and _is_complete(workdir, newest, settings.num_steps):
                _say(f"{workdir} already holds step {newest} of {settings.num_steps}: nothing to do")
                return RunResult(newest, None, time.monotonic() - started_s)
            if newest is None:
                state = task.init_state()
            else:
                state = checkpoints.restore(task.abstract_state())
                _say(f"going on from step {newest} of {settings.num_steps} in {workdir}")
            start = int(state.step)
            with (
                MetricLog(workdir, start) as log,
                Progress(start, settings.num_steps, task.examples_per_step) as progress,
                Profiler(workdir, settings.profile_steps) as profiler,
            ):
                loop = _Loop(task, workdir, settings, config_json, checkpoints, log, progress, profiler)
                step, interrupted = loop.train(state, task.batches(start), start, newest, stop)
    return RunResult(step, interrupted, time.monotonic() - started_s)


class _Loop:
    def __init__(self, task, workdir, settings, config_json, checkpoints, log, progress, profiler):
        self._task, self._workdir, self._settings = task, workdir, settings
        self._config_json, self._checkpoints = config_json, checkpoints
        self._log, self._progress, self._profiler = log, progress, profiler
        self._best = Metric.parse(settings.keep_best)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._has_peak = peak is not None
        self._throughput = Throughput(task.examples_per_step, peak and peak * jax.device_count())
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._num_bad = 0
        self._saved_step: int | None = None

    def train(
        self, state: Any, batches: Iterator, start: int, newest: int | None, stop: "StopFlag"
    ) -> tuple[int, int | None]:
        """Returns the steps done and the signal that ended the run, if one did."""
        settings = self._settings
        self._saved_step = newest
        for step in range(start, settings.num_steps + 1):
            # A boundary: `step` updates are done. The order matters. Lines of the steps before this one
            # are written before the checkpoint that makes a resumed run skip them; the checkpoint comes
            # before anything that could fail and before the next batch is pulled, so that a resumed run
            # pulls that batch itself; an evaluation belongs to the part that a resumed run repeats.
            is_last = step == settings.num_steps
            interrupted = stop.agreed_number(step)
            if is_last or interrupted or (step > start and _is_due(step, settings.save_every_steps)):
                self._save(state, step)
            if interrupted:
                break
            self._observe(state, step, is_last)
            if is_last:
                break
            try:
                self._profiler.at_boundary(step, lambda: self._read_finished(0))
                batch = self._throughput.wait_for(batches)
            except StopIteration:
                raise RunError(f"the data ended at step {step} of {settings.num_steps}") from None
            state, metrics = self._task.train_step(state, batch, step)
            self._pending.append((step, metrics))
            self._read_finished(_STEPS_AHEAD)
        self._wait_for_save()
        return step, interrupted

    def _observe(self, state: Any, step: int, is_last: bool) -> None:
        """Evaluation and pictures, where they are due."""
        settings = self._settings
        has_evaluation = step == 0 or is_last or _is_due(step, settings.eval_every_steps)
        every = settings.picture_every_steps
        has_pictures = every >= 0 and (is_last or (step > 0 and _is_due(step, every)))
        if not (has_evaluation or has_pictures):
            return
        self._read_finished(0)
        with self._throughput.pause():
            if has_pictures:
                self._log.write_pictures(step, self._task.pictures(state))
            if has_evaluation:
                metrics = self._task.evaluate(state)
                self._keep_if_best(state, step, metrics)
                # Last of all, because its line at the end is what marks a run as complete.
                self._log.write(step, "eval", metrics)

    def _keep_if_best(self, state: Any, step: int, metrics: dict[str, Any]) -> None:
        """The line of this evaluation comes later: a run killed before it evaluates this step again."""
        if self._best is None:
            return
        score = self._best.score(metrics)
        if step > 0 and self._checkpoints.is_best(score):
            self._save(state, step)
            self._wait_for_save()  # the score must not go before the checkpoint that it is of
            self._checkpoints.add_score(step, score)

    def _read_finished(self, num_left: int) -> None:
        """Waits for all but the newest `num_left` steps and reads what they tell."""
        while len(self._pending) > num_left:
            step, metrics = self._pending.popleft()
            is_bad = bool(metrics["is_bad"])  # waits for the step
            self._throughput.count_step(self._task.flops_of_step(step) if self._has_peak else 0.0)
            if step % self._settings.log_every_steps == 0 or step == self._settings.num_steps - 1:
                self._log.write(step, "train", jax.device_get(metrics) | self._throughput.take())
            self._progress.show(step + 1, metrics["loss"])
            self._num_bad = self._num_bad + 1 if is_bad else 0
            if self._num_bad >= self._settings.max_bad_steps:
                raise RunError(
                    f"the loss was not finite for {self._num_bad} steps in a row, up to step {step}; "
                    f"{self._workdir} keeps the checkpoint of step {self._saved_step}"
                )

    def _save(self, state: Any, step: int) -> None:
        self._read_finished(0)
        if step == (self._saved_step or 0):  # on disk already, or a function of the seed alone
            return
        assert int(state.step) == step, "every step counts, also one whose update was skipped"
        with self._throughput.pause():
            try:
                self._checkpoints.save(state, {"step": step, "config": self._config_json})
            except Exception as error:  # of this save or of the one before, which ran in the background
                raise self._save_error(error) from error
        self._saved_step = step

    def _wait_for_save(self) -> None:
        try:
            self._checkpoints.wait()
        except Exception as error:
            raise self._save_error(error) from error

    def _save_error(self, error: Exception) -> RunError:
        return RunError(f"a checkpoint could not be written to {self._workdir}: {shorten(error)}")


def _is_complete(workdir: Path, newest: int, num_steps: int) -> bool:
    # The final evaluation comes after the final checkpoint: a kill between them leaves it to be done.
    return newest > num_steps or (newest == num_steps and has_line(workdir, "eval", num_steps))


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
