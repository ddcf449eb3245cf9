"""A grid of sampling options: each point is drawn, timed and scored; one CSV that a rerun continues, and a figure."""

import csv
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from mvar_jax.errors import InputError, shorten
from mvar_jax.evaluation.sample_sets import SampleSet
from mvar_jax.files.atomic import replacing, write_atomically
from mvar_jax.models.networks import Networks
from mvar_jax.progress import Progress
from mvar_jax.sampling.bulk import sample_reader
from mvar_jax.sampling.options import SampleOptions
from mvar_jax.sampling.order import Order
from mvar_jax.sampling.sampler import sample

CSV_FILE, FIGURE_FILE = "sweep.csv", "sweep.png"
AXES = ("cfg", "temperature", "top_k", "top_p", "refine_scales")
COST, CHOSEN = "seconds_a_sample", "chosen"
MARKERS = "osDv^<>pPX"
MAX_LABELS = 30  # more would cover each other


@dataclasses.dataclass(frozen=True)
class Point:
    """Options of a grid.

    Attributes:
      options: how ids are drawn.
      refine_scales: the scales that the refiner draws, as text: all, off, or numbers.
      networks: with the refiner at these scales, placed on the sweep's mesh.
    """

    options: SampleOptions
    refine_scales: str
    networks: Networks

    @property
    def key(self) -> tuple[str, ...]:
        """Return the texts of AXES in the CSV."""
        temperature = self.options.temperature
        texts = ",".join(map(str, temperature)) if isinstance(temperature, tuple) else str(temperature)
        return str(self.options.cfg), texts, str(self.options.top_k), str(self.options.top_p), self.refine_scales


@dataclasses.dataclass(frozen=True)
class Judge:
    """How samples are scored.

    Attributes:
      distance: name of the score that is better if lower, by which a point is chosen.
      quality: name of the score that is better if higher.
      score: samples -> both by name.
      about: JSON values on which the scores depend.
      warnings: why the scores will not compare with others, as sentences.
    """

    distance: str
    quality: str
    score: Callable[[SampleSet], Mapping[str, float]]
    about: Mapping[str, object]
    warnings: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Points, and what is the same for all of them.

    Attributes:
      order: the samples of a point: labels, seed and batches; its options are replaced by each point's.
      size: rows and columns of a sample.
      mesh: that of the points' networks.
      least: `quality` that the chosen point must have at least.
    """

    points: Sequence[Point]
    order: Order
    size: tuple[int, int]
    mesh: Mesh
    judge: Judge
    least: float

    @property
    def num(self) -> int:
        """Return the number of samples of a point."""
        return len(self.order.labels_N)

    def run(self, out: Path, check_stop: Callable[[], None]) -> list[dict[str, str]]:
        """Draw and score the points that the CSV in `out` lacks; write it after each one, and the figure at the end.

        check_stop: called before each batch; what it raises ends the sweep with the points that are complete.

        Returns all rows of the CSV, also of points that an earlier run had in its grid.
        """
        rows = self._read(out / CSV_FILE)
        known = {tuple(row[name] for name in AXES) for row in rows}
        missing = [point for point in self.points if point.key not in known]
        total, done = len(self.points) * self.num, (len(self.points) - len(missing)) * self.num
        with Progress("sweep", total, "sample", done=done) as progress:
            for point in missing:
                scores, seconds = self._measure(point, progress, check_stop)
                # each point has a program of its own, which on a CPU keeps some 430 memory maps of the 65,530 that
                # Linux allows a process
                sample.clear_cache()
                row = dict(zip(AXES, point.key, strict=True)) | {k: repr(float(x)) for k, x in scores.items()}
                rows.append(row | {COST: f"{seconds / self.num:.6g}"})
                self._write(out, rows)
        self._write(out, rows)  # `least` may be another one
        self._draw(out / FIGURE_FILE, rows)
        return rows

    def _measure(self, point: Point, progress: Progress, check_stop) -> tuple[Mapping[str, float], float]:
        """Return (scores, seconds of drawing without compilation)."""
        order = dataclasses.replace(self.order, options=point.options)
        first = min(self.num, order.batch_size)
        check_stop()
        sample_reader(point.networks, order, self.mesh)(range(first))  # compiles
        draw, seconds = sample_reader(point.networks, order, self.mesh), 0.0

        def read(rows: range) -> np.ndarray:
            nonlocal seconds
            check_stop()
            began_s = time.perf_counter()
            pixels = draw(rows)
            seconds += time.perf_counter() - began_s
            progress.update(len(rows))
            return pixels

        samples = SampleSet("sweep", self.num, self.size, read, {}, order.labels_N, sampling={})
        return self.judge.score(samples), seconds

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*AXES, self.judge.distance, self.judge.quality, COST, CHOSEN)

    def _read(self, path: Path) -> list[dict[str, str]]:
        """Return the rows of a CSV; no rows if the file is missing. Raises InputError if it is damaged."""
        if not path.exists():
            return []
        try:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            for row in rows:
                if row.keys() != {*self._columns}:
                    raise ValueError(f"columns {', '.join(map(str, row))}")
                if not all(math.isfinite(float(row[name])) for name in self._columns[len(AXES) : -1]):
                    raise ValueError("a score that is not finite")
        except (ValueError, TypeError) as error:
            message = f"out={path.parent} has a {CSV_FILE} that cannot be continued: {shorten(error)}; remove it"
            raise InputError(message, field="out", given=str(path), expected=", ".join(self._columns)) from None
        return rows

    def _write(self, out: Path, rows: list[dict[str, str]]) -> None:
        best = self.choose(rows)
        for row in rows:
            row[CHOSEN] = "yes" if row is best else ""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / CSV_FILE, text.getvalue())

    def choose(self, rows: list[dict[str, str]]) -> dict[str, str] | None:
        """Return the row of the lowest distance, of equal ones the cheapest; None if none has the quality."""
        good = [row for row in rows if float(row[self.judge.quality]) >= self.least]
        return min(good, key=lambda row: (float(row[self.judge.distance]), float(row[COST])), default=None)

    def _draw(self, path: Path, rows: list[dict[str, str]]) -> None:
        """Plot distance against cost, coloured by quality, a marker for each choice of refined scales."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 6), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        number = lambda name: np.array([float(row[name]) for row in rows])
        cost, distance, quality = number(COST), number(self.judge.distance), number(self.judge.quality)
        refined = np.array([row["refine_scales"] for row in rows])
        limits = {"vmin": quality.min(), "vmax": max(quality.max(), quality.min() + 1e-9)}
        for kind, marker in zip(sorted({*refined}), itertools.cycle(MARKERS), strict=False):
            own = refined == kind
            style = {"marker": marker, "label": f"refined scales: {kind}", **limits}
            shown = axis.scatter(cost[own], distance[own], c=quality[own], **style)
        for i, row in enumerate(rows if len(rows) <= MAX_LABELS else ()):
            axis.annotate(describe(row, rows), (cost[i], distance[i]), (4, 4), textcoords="offset points", fontsize=7)
        if (best := self.choose(rows)) is not None:
            style = {"marker": "*", "markersize": 22, "markerfacecolor": "none", "color": "tab:red"}
            style |= {"linestyle": "none", "label": f"chosen: {describe(best, rows)}"}
            axis.plot(float(best[COST]), float(best[self.judge.distance]), **style)
        axis.set(xlabel="seconds a sample", ylabel=self.judge.distance, xlim=(0, None))
        axis.legend()
        figure.colorbar(shown, label=self.judge.quality)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)


def describe(row: Mapping[str, str], rows: list[dict[str, str]]) -> str:
    """Return the label of a row: guidance, temperature, filters that are on, and refined scales if rows differ."""
    words = [f"cfg {row['cfg']}", f"T {row['temperature']}"]
    words += [f"{name} {row[name]}" for name in ("top_k", "top_p") if float(row[name])]
    if len({one["refine_scales"] for one in rows}) > 1:
        words.append(f"refined scales {row['refine_scales']}")
    return ", ".join(words)
