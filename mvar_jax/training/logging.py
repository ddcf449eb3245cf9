"""Output of a run: metrics.jsonl, TensorBoard events, image files and one line of progress."""

import io
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mvar_jax.errors import RunError, shorten
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.directories import local_folder, upload_folder
from mvar_jax.files.images import to_picture
from mvar_jax.files.lines import Lines, open_lines, read_lines
from mvar_jax.files.paths import as_path, is_store
from mvar_jax.progress import Progress

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
UPLOAD_S = 60.0  # between uploads of events to a store, or 50 times as long as an upload takes
PICTURE_FOLDER = "pictures"


class MetricLog:
    """The scalars, vectors (one value per scale) and images of a run; only the first process writes.

    A run that resumes at `start_step` logs every step from there on again, so lines of these steps are dropped first:
    the file has each logged step once. The evaluation of `start_step` itself, of the weights that the run resumes
    from, keeps its line until it is repeated.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int):
        self._workdir, self._start_step = as_path(workdir, "workdir"), start_step
        self._is_writing = jax.process_index() == 0
        self._keeps_start = start_step > 0  # without a checkpoint another config may have written it
        if self._is_writing:
            self._lines = self._open()
            self._tensorboard = _TensorBoard(self._workdir / TENSORBOARD_FOLDER)

    def _open(self) -> Lines:
        """Open the file without the lines that this run writes again."""
        start, of_start = self._start_step, ("eval", self._start_step) if self._keeps_start else None
        is_kept = lambda line: line["step"] < start or (line["kind"], line["step"]) == of_start
        return open_lines(self._workdir / METRICS_FILE, lambda line: _is_whole(line) and is_kept(line))

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, error_type, *_):
        try:
            self.close(wait=not (error_type and issubclass(error_type, KeyboardInterrupt)))
        except RunError:
            if error_type is None:
                raise

    def write(self, step: int, kind: Literal["train", "eval"], metrics: dict[str, Any]) -> None:
        """Write one line; values are numbers or [S] vectors, kept to float32 precision, non-finite ones as null."""
        if not self._is_writing:
            return
        values = {name: _round(value) for name, value in metrics.items()}
        if self._keeps_start and (kind, step) == ("eval", self._start_step):
            self._call(self._lines.close)
            self._keeps_start = False
            self._lines = self._open()
        self._lines.write({"step": step, "kind": kind, **values})
        self._tensorboard.add("write_scalars", step, _name_scalars(kind, values))

    def write_pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Write images, uint8 [Y, X, C] each, as workdir/pictures/NAME_STEP.png and to TensorBoard."""
        if not self._is_writing or not pictures:
            return
        folder = self._workdir / PICTURE_FOLDER
        folder.mkdir(exist_ok=True)
        for name, picture_YXC in pictures.items():
            write_atomically(folder / f"{name}_{step:06d}.png", _encode_png(picture_YXC))
        self._tensorboard.add("write_images", step, {k: v[None] for k, v in pictures.items()})

    def write_histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Write the distributions of numbers, `[N]` by name, to TensorBoard."""
        if self._is_writing and values:
            self._tensorboard.add("write_histograms", step, values)

    def flush(self) -> None:
        """Return when all lines can be read by others. Raises RunError if they cannot be written."""
        if self._is_writing:
            self._call(self._lines.flush)

    def _call(self, method: Callable[[], None]) -> None:
        try:
            method()
        except OSError as error:
            raise RunError(f"{self._workdir / METRICS_FILE} cannot be written: {shorten(error)}") from error

    def close(self, wait: bool = True) -> None:
        """Close the files. wait: until the TensorBoard events are written. Raises RunError as `flush`."""
        if self._is_writing:
            self._tensorboard.close(wait)
            self._call(self._lines.close)


def has_line(workdir: str | os.PathLike, kind: str, step: int) -> bool:
    """Return whether metrics.jsonl already has the line of this step."""
    lines = read_lines(as_path(workdir) / METRICS_FILE)
    return any(_is_whole(line) and (line["kind"], line["step"]) == (kind, step) for line in lines)


def _is_whole(line: dict[str, Any]) -> bool:
    """Return whether a line has what every line of the log has; one without is damaged and dropped."""
    return isinstance(line.get("step"), int) and isinstance(line.get("kind"), str)


class StepProgress(Progress):
    """Progress of a run with its rate, loss and memory; only the first process shows it."""

    def __init__(self, start_step: int, num_steps: int, examples_per_step: int):
        super().__init__("step", num_steps, "step", done=start_step, is_shown=jax.process_index() == 0)
        self._examples_per_step = examples_per_step
        self._is_compiling = True

    def count_step(self, loss: Any) -> None:
        """Count a step. `loss` is a scalar array, fetched only if the progress is shown.

        The first step, whose program is compiled, counts in no rate.
        """
        if self._is_compiling and self._done + 1 < self._total:
            self._is_compiling = False
            self.skip_to(self._done + 1)
            return self.start_here()
        examples = self._examples_per_step
        self.update(note=lambda rate: f"{rate * examples:.1f} images/s, loss {float(loss):.4f}, {describe_memory()}")


def describe_memory() -> str:
    """Return the peak memory in MiB of the first device if it reports one, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"device {stats['peak_bytes_in_use'] / 2**20:.0f} MiB"
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, KiB on Linux
    return f"RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


class _TensorBoard:
    """TensorBoard events, written by a thread: importing the writer takes seconds that training need not wait for."""

    def __init__(self, folder: Path):
        self._queue = queue.SimpleQueue()
        # a daemon, so an abort does not wait for it
        self._thread = threading.Thread(target=self._write_all, args=(folder,), daemon=True)
        self._thread.start()

    def add(self, method: str, step: int, values: dict[str, Any]) -> None:
        if self._thread.is_alive():  # nobody would take it from the queue
            self._queue.put((method, step, values))

    def close(self, wait: bool) -> None:
        self._queue.put(None)
        if wait:
            self._thread.join()

    def _write_all(self, folder: Path) -> None:
        writer = None
        try:
            with local_folder(folder) as place:  # TensorFlow writes to no s3://, and to no emulator
                writer = _open_summary_writer(place)
                upload_s = time.monotonic() + UPLOAD_S
                while item := self._queue.get():
                    method, step, values = item
                    getattr(writer, method)(step, values)
                    if self._queue.empty():
                        writer.flush()
                    if is_store(folder) and time.monotonic() > upload_s:
                        began_s = time.monotonic()
                        upload_folder(place, folder)
                        now_s = time.monotonic()
                        upload_s = now_s + max(UPLOAD_S, 50 * (now_s - began_s))
                writer.flush()
        except ImportError as error:
            text = f"TensorBoard events are not written ({error}); pip install 'mvar_jax[tensorboard]' brings them"
            print(text, file=sys.stderr, flush=True)
        except Exception as error:  # a full disk or a broken TensorFlow must not end the training
            print(f"TensorBoard events are no longer written: {error}", file=sys.stderr, flush=True)
        finally:
            if writer:
                writer.close()


def _open_summary_writer(folder: Path):
    # read when TensorFlow is imported, here for the first time
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it announces itself; nothing is computed with it
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(str(folder))


def _round(value: Any) -> Any:
    """Return numbers in float32's shortest form, so equal runs give equal text."""
    if isinstance(value, int | np.integer):
        return int(value)
    array = np.asarray(value, np.float32)
    if array.ndim:
        return [_round(element) for element in array]
    return float(str(array)) if math.isfinite(array) else None


def _name_scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return scalars by name: `loss_per_scale` [S] becomes loss/scale_0 ...; evaluations get the prefix eval/."""
    prefix = "" if kind == "train" else f"{kind}/"
    scalars = {}
    for name, value in values.items():
        if isinstance(value, list):
            stem = f"{prefix}{name.removesuffix('_per_scale')}/scale_"
            scalars |= {f"{stem}{i}": element for i, element in enumerate(value)}
        else:
            scalars[prefix + name] = value
    return {name: value for name, value in scalars.items() if value is not None}


def _encode_png(picture_YXC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    to_picture(picture_YXC).save(buffer, "PNG")
    return buffer.getvalue()
