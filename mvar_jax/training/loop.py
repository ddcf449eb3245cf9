"""The training loop. It knows tasks (steps, batches, evaluations) and neither images nor models."""

import dataclasses
import functools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mvar_jax.checkpoints.best import Metric
from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.errors import InputError, RunError
from mvar_jax.files.paths import as_path
from mvar_jax.hardware.machines import peak_flops
from mvar_jax.processes import group
from mvar_jax.processes.holding import hold
from mvar_jax.processes.join import join_initialized
from mvar_jax.processes.shared import check_shared
from mvar_jax.training.logging import MetricLog, StepProgress, has_line
from mvar_jax.training.newest import PER_SCALE, NewestPerScale
from mvar_jax.training.profiling import Profiler
from mvar_jax.training.protocol import Task
from mvar_jax.training.resume_rules import check_resumable, describe_change, keep_identity
from mvar_jax.training.saving import Saver, check_first, say
from mvar_jax.training.settings import LoopSettings
from mvar_jax.training.stopping import RunStopFlag
from mvar_jax.training.throughput import Throughput

# Metrics are read this many steps late: the device always has work queued, but batches do not pile up on it and a
# signal waits for a few steps at most.
_STEPS_AHEAD = 2


class RunResult(NamedTuple):
    """The result of a run. interrupted: the signal that ended it early, None if it is complete."""

    step: int
    interrupted: int | None
    seconds: float


def run(
    task: Task,
    workdir: str | os.PathLike,
    settings: LoopSettings,
    config_json: dict,
    prepare: Callable[[], None] = lambda: None,
    has_lock: bool = True,
    strict: bool = False,
    allow_change: Collection[str] = (),
) -> RunResult:
    """Train to `settings.num_steps`, resuming from the newest checkpoint in `workdir` that is not damaged.

    A resumed run gives bit-equal metrics and weights; a finished run goes on if num_steps is larger now. SIGINT,
    SIGTERM and SIGHUP end a run at a step boundary with a checkpoint, unless it is the last one; a second SIGINT
    raises KeyboardInterrupt at once.

    Args:
      task: what is trained.
      workdir: folder of checkpoints, metrics and pictures.
      settings: of the loop.
      config_json: the configuration, kept with the workdir and its checkpoints.
      prepare: called as soon as the workdir is held.
      has_lock: refuse a workdir that another run holds.
      strict: refuse a damaged newest checkpoint instead of resuming from an older one.
      allow_change: keys of the configuration that may change although they change what is learned.

    Raises:
      InputError: the workdir has another configuration, is in use or unwritable, or has no good checkpoint; or
        there is no evaluation for keep_best.
      RunError: too many steps in a row without a finite loss and gradient, no more batches, or a failed save.
    """
    started_s = time.monotonic()
    workdir, best = as_path(workdir, "workdir"), _metric_of(settings, task)
    join_initialized()
    check_shared("workdir", workdir)
    check = functools.partial(check_resumable, workdir, config_json, task.data_identity, allow_change)
    check()  # before the lock, so a refused run leaves no trace
    with RunStopFlag() as stop, hold("workdir", workdir, has_lock, kept="the newest checkpoint is intact"):
        changes = check()
        if changes and _is_complete(workdir, newest := changes[0]["step"], settings.num_steps):
            # kept in config.json, the changes would refuse the command that made the run
            stays = ", ".join(f"config.{change['key']} stays {change['from']!r}" for change in changes)
            say(f"{_complete(workdir, newest, settings)}, so {stays}; a larger config.num_steps continues the run")
            return RunResult(newest, None, time.monotonic() - started_s)
        keep_identity(workdir, config_json, task.data_identity, changes)
        for change in changes:
            say(describe_change(task.data_identity.get("train", {}).get("num_items"), **change))
        prepare()
        with Checkpoints(workdir, settings.keep_checkpoints) as checkpoints:
            newest = checkpoints.latest_step()
            if newest is not None and _is_complete(workdir, newest, settings.num_steps):
                say(_complete(workdir, newest, settings))
                return RunResult(newest, None, time.monotonic() - started_s)
            if newest is None:
                state = task.init_state()
            else:
                state = checkpoints.restore(task.abstract_state(), strict, say)
                newest = int(state.step)
                say(f"resuming from step {newest} of {settings.num_steps} in {workdir}")
            start = int(state.step)
            checkpoints.forget_scores_after(start)
            if best is not None:
                measured_by = best.describe(task.settings_of(best.name))
                if others := checkpoints.measure_by(measured_by):
                    say(f"the best checkpoint was chosen by {others}: it is chosen anew by {measured_by}")
            per_scale = NewestPerScale(None if newest is None else checkpoints.read_meta(start).get(PER_SCALE))
            check_first(state, workdir, None if newest is None else start)
            with (
                MetricLog(workdir, start) as log,
                StepProgress(start, settings.num_steps, task.examples_per_step) as progress,
                Profiler(workdir, settings.profile_steps) as profiler,
            ):
                saver = Saver(workdir, checkpoints, config_json, None if newest is None else start)
                loop = _Loop(task, settings, checkpoints, saver, log, progress, profiler, per_scale)
                step, interrupted = loop.train(state, task.batches(start), start, stop)
    return RunResult(step, interrupted, time.monotonic() - started_s)


def _metric_of(settings: LoopSettings, task: Task) -> Metric | None:
    """Return the metric of keep_best. Raises InputError if no evaluation of the task has it."""
    if settings.keep_best and not task.has_evaluation:
        words = f"config.keep_best={settings.keep_best} needs an evaluation, but the data have no validation split: "
        words += "set it to '', or hold images out with config.data.val_fraction"
        raise InputError(words, field="keep_best", given=settings.keep_best, expected="''")
    best = Metric.parse(settings.keep_best)
    if best is not None and task.metrics:
        best.check(task.metrics)
    return best


@dataclasses.dataclass
class _Loop:
    _task: Task
    _settings: LoopSettings
    _checkpoints: Checkpoints
    _saver: Saver
    _log: MetricLog
    _progress: StepProgress
    _profiler: Profiler
    _newest: NewestPerScale

    def __post_init__(self):
        self._best = Metric.parse(self._settings.keep_best)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._has_peak = peak is not None
        self._throughput = Throughput(self._task.examples_per_step, peak and peak * jax.device_count())
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._num_bad = 0  # steps in a row, up to the last one read

    def train(self, state: Any, batches: Iterator, start: int, stop: RunStopFlag) -> tuple[int, int | None]:
        """Return the number of steps done and the signal that ended the run before its last step, or None."""
        settings = self._settings
        for step in range(start, settings.num_steps + 1):
            # A boundary: `step` updates are done. DO NOT REORDER.
            # 1. Write the metrics of the steps before the checkpoint: a run resumed from it skips these steps.
            # 2. Save before anything that could fail and before pulling the next batch: a resumed run pulls it.
            # 3. Evaluate after saving: a resumed run repeats the evaluation.
            is_last = step == settings.num_steps
            interrupted = stop.agreed_number(step)
            is_due = is_last or interrupted or (step > start and _is_due(step, settings.save_every_steps))
            if is_due or self._saver.is_owed:
                self._save(state, step, is_proven=is_last and self._is_proven_by_evaluation(state))
            if is_last and self._saver.is_owed:
                raise RunError(f"the weights of the last step, {step}, are not good to keep; {self._saver.kept()}")
            if interrupted and not is_last:
                self._saver.wait()
                self._say_stopped(interrupted, step)
                return step, interrupted
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
        self._saver.wait()
        return settings.num_steps, None

    def _say_stopped(self, number: int, step: int) -> None:
        name, steps = signal.Signals(number).name, f"step {step} of {self._settings.num_steps}"
        say(f"stopped by {name} at {steps}; {self._saver.kept()}; the same command continues")

    def _observe(self, state: Any, step: int, is_last: bool) -> None:
        """Write pictures and evaluate, if due."""
        settings = self._settings
        has_evaluation = is_last or (_is_due(step, settings.eval_every_steps) and self._task.has_evaluation)
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
                self._log.write_histograms(step, self._task.histograms(state))
                # Last of all: the line of the final evaluation marks a run as complete, even if it is empty.
                self._log.write(step, "eval", metrics)

    def _keep_if_best(self, state: Any, step: int, metrics: dict[str, Any]) -> None:
        """Save the checkpoint if its score is the best; called before the line of this evaluation is written.

        A run killed in between evaluates this step again.
        """
        if self._best is None:
            return
        score = self._best.score(metrics)
        if step > 0 and self._checkpoints.is_best(score):
            self._save(state, step, is_proven=True)  # by the finite score
            if self._saver.saved_step == step:
                self._checkpoints.add_score(step, score)

    def _read_finished(self, num_left: int) -> None:
        """Wait for all but the newest `num_left` steps and read their metrics."""
        while len(self._pending) > num_left:
            step, metrics = self._pending.popleft()
            is_bad = bool(metrics["is_bad"])  # waits for the step
            self._throughput.count_step(self._task.flops_of_step(step) if self._has_peak else 0.0)
            scales = self._task.scales_of_step(step)
            if scales is not None and not is_bad:
                self._newest.note(scales, metrics)
            if step % self._settings.log_every_steps == 0 or step == self._settings.num_steps - 1:
                values = jax.device_get(metrics) | self._newest.fetch()
                self._log.write(step, "train", values | self._throughput.take())
            self._progress.count_step(metrics["loss"])
            self._num_bad = self._num_bad + 1 if is_bad else 0
            if self._num_bad >= self._settings.max_bad_steps:
                self._saver.drop_poisoned(step + 1 - self._num_bad)
                raise RunError(
                    f"the loss or its gradient was not finite for {self._num_bad} steps in a row, up to step {step}; "
                    f"{self._saver.kept()}"
                )

    def _save(self, state: Any, step: int, is_proven: bool = False) -> None:
        """Save the state unless it may be poisoned. is_proven: it is good although the last step was not."""
        self._read_finished(0)
        with self._throughput.pause():
            self._log.flush()  # a run resumed from this checkpoint does not write these lines again
            self._saver.save(state, step, is_proven or not self._num_bad, lambda: {PER_SCALE: self._newest.to_json()})

    def _is_proven_by_evaluation(self, state: Any) -> bool:
        """Return whether the weights after a bad last step are good: no step follows that would show it."""
        self._read_finished(0)
        if not self._num_bad:
            return False
        metrics = self._task.evaluate(state)
        scalars = [value for value in metrics.values() if isinstance(value, int | float)]
        if "loss" in metrics:
            scalars = [metrics["loss"]]
        return not scalars or any(map(math.isfinite, scalars))  # without any, finite weights are enough for `Saver`


def _complete(workdir: Path, newest: int, settings: LoopSettings) -> str:
    return f"{workdir} already holds step {newest} of {settings.num_steps}: nothing to do"


def _is_complete(workdir: Path, newest: int, num_steps: int) -> bool:
    # The final evaluation comes after the final checkpoint: a kill in between leaves it to be done. One process reads
    # the line for all: others may see the file late, or as the first one has rewritten it.
    here = group.current()
    has_end = here.index == 0 and has_line(workdir, "eval", num_steps)
    is_complete = newest > num_steps or (newest == num_steps and has_end)
    return here.gather("whether the run is complete", bool(is_complete))[0]


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
