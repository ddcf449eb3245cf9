"""Figures of a finished digits run, their required bounds, and the files report.json and report.md."""

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from mvar_jax.digits import judge
from mvar_jax.digits.quality import Judges, Real, Samples
from mvar_jax.errors import InputError
from mvar_jax.files.atomic import write_atomically
from mvar_jax.files.paths import as_path
from mvar_jax.ops import metrics


class Requirement(NamedTuple):
    """A figure, its direction and bound, and its meaning in one line."""

    figure: str
    direction: str
    bound: float | str  # a number, or the name of another figure
    meaning: str


REQUIREMENTS = (
    Requirement("psnr_db", ">=", 28.0, "mean PSNR of held-out reconstructions, dB"),
    Requirement("codebook_used_fraction", ">=", 0.9, "share of codes used on the real images"),
    Requirement("judge_real_accuracy", ">=", 0.98, "accuracy of the judge on real held-out images"),
    Requirement("judge_sample_accuracy", ">=", 0.98, "share of samples that the judge assigns to their label"),
    Requirement("fd_samples", "<=", "fd_allowed", "Frechet distance to the real held-out images"),
    Requirement("within_class_spread", ">=", 0.75, "variance within a class, samples over real held-out images"),
    Requirement(
        "nearest_ratio",
        ">=",
        0.75,
        "no copies: nearest-training distance of samples over that of held-out",
    ),
    Requirement("num_distinct_pyramids", ">=", "num_samples", "no two samples have the same tokens"),
    Requirement("val_loss_worst_over_log_v", "<", 0.6, "final validation loss of the worst scale over log V"),
    Requirement("total_s", "<=", 480.0, "training and sampling, wall seconds"),
    Requirement("clone_to_pictures_s", "<=", 720.0, "installation, training, sampling and report, wall seconds"),
    Requirement("peak_rss_mib", "<=", 4096.0, "largest resident memory of any stage, MiB"),
)
FD_SHARE = 0.8  # of `fd_bound` that samples are allowed
COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def measure_reconstructions(images_BYX3, reconstructions_BYX3) -> dict:
    """Return the means of PSNR and SSIM over images, and `psnr_pooled_mse_db`, the PSNR of the mean squared error."""
    images, reconstructions = judge.to_unit(images_BYX3), judge.to_unit(reconstructions_BYX3)
    per_image = metrics.psnr(images, reconstructions, 1.0)
    pooled = np.mean(10 ** (-per_image / 10))
    return {
        "psnr_db": float(per_image.mean()),
        "psnr_pooled_mse_db": float(metrics.psnr_of_error(np.asarray(pooled), 1.0)),
        "ssim": float(metrics.ssim(images, reconstructions, 1.0).mean()),
    }


def measure_codebook(code_counts_SV) -> dict:
    """Return usage and perplexity of the codes at each scale on the real images."""
    code_counts_SV = np.asarray(code_counts_SV)
    return {
        "num_codes": code_counts_SV.shape[1],
        "log_v": math.log(code_counts_SV.shape[1]),
        "codebook_used_fraction": float((code_counts_SV.sum(0) > 0).mean()),
        "usage_per_scale": (code_counts_SV > 0).mean(1).tolist(),
        "perplexity_per_scale": [metrics.perplexity(counts_V) for counts_V in code_counts_SV],
    }


def measure_bounds(judges: Judges, reconstructions) -> dict:
    """Return Frechet distances to the real held-out images, and the bounds of those of samples.

    `fd_bound` is twice that of the training images plus that of the reconstructions, `fd_allowed` FD_SHARE of it.
    """
    figures = judges.distances("train", judges.real.train) | judges.distances("reconstructions", reconstructions)
    for prefix in judges.spaces:
        figures[f"{prefix}_bound"] = 2 * figures[f"{prefix}_train"] + figures[f"{prefix}_reconstructions"]
    return figures | {"fd_allowed": FD_SHARE * figures["fd_bound"]}


class Validation(NamedTuple):
    """The validation of a run: its curve, and how sure the model is at the end, in nats a token.

    Attributes:
      steps_K: steps of the curve.
      loss_KS, loss_K: of each scale, and of all tokens.
      entropy_S: of the model's own distributions on the same images; below the loss, it is over-confident.
    """

    steps_K: Sequence[int]
    loss_KS: Sequence[Sequence[float]]
    loss_K: Sequence[float]
    entropy_S: Sequence[float]


def measure_validation(curve: Validation, log_v: float) -> dict:
    """Return the first and last row of a validation curve and the entropy, in nats a token."""
    loss_KS = np.asarray(curve.loss_KS, np.float64)
    over_log_v_S = loss_KS[-1] / log_v
    return {
        "val_steps": [int(curve.steps_K[0]), int(curve.steps_K[-1])],
        "val_loss_end": float(curve.loss_K[-1]),
        "val_loss_start_per_scale": loss_KS[0].tolist(),
        "val_loss_end_per_scale": loss_KS[-1].tolist(),
        "val_loss_end_over_log_v_per_scale": over_log_v_S.tolist(),
        "val_entropy_per_scale": np.asarray(curve.entropy_S, np.float64).tolist(),
        "val_loss_worst_over_log_v": float(over_log_v_S.max()),
    }


class StageRecord(TypedDict):
    """What launch/stage.py notes of a stage."""

    wall_s: float
    cpu_s: float
    peak_rss_mib: float


def measure_stages(stages: Mapping[str, Mapping]) -> dict:
    """Sum the records of launch/stage.py; memory is that of the largest process of any stage.

    `total_s` covers training and sampling; `clone_to_pictures_s` adds installation and the report itself.
    """
    fields = ("wall_s", "cpu_s", "peak_rss_mib")
    work = [record for name, record in stages.items() if name not in ("install", "report")]
    return {
        "stages": {name: {field: record[field] for field in fields} for name, record in stages.items()},
        "total_s": sum(record["wall_s"] for record in work),
        "total_cpu_s": sum(record["cpu_s"] for record in work),
        "clone_to_pictures_s": sum(record["wall_s"] for record in stages.values()),
        "peak_rss_mib": max(record["peak_rss_mib"] for record in stages.values()),
    }


def measure(
    *,
    real: Real,
    reconstructions,
    samples: Samples,
    code_counts_SV,
    validation: Validation,
    stages: Mapping[str, Mapping],
    refined: tuple[Samples, Validation] | None = None,
) -> dict:
    """Return all figures of a run by name, as plain numbers, lists and dictionaries.

    Args:
      reconstructions: of the held-out images, in the same order.
      samples, validation: of the transformer.
      code_counts_SV: counts of the codes at each scale over all real images.
      stages: the log of launch/stage.py.
      refined: samples and validation of the refiner, if there is one; the figures are then its own, and those of the
        transformer are in the dictionary `base`.

    Raises InputError if lengths that must be equal differ, or there is no stage.
    """
    sets = {"": (samples, validation)} | ({} if refined is None else {"refined_": refined})
    pairs = {
        "train_labels": (real.train_labels, real.train),
        "heldout_labels": (real.heldout_labels, real.heldout),
        "reconstructions": (reconstructions, real.heldout),
    }
    for name, (drawn, curve) in sets.items():
        pairs[f"{name}sample_labels"] = drawn.labels, drawn.images
        pairs[f"{name}sample_ids"] = drawn.ids, drawn.images
        pairs[f"{name}validation_losses"] = curve.loss_KS, curve.steps_K
    for name, (given, owner) in pairs.items():
        if len(given) != len(owner) or len(given) == 0:
            expected = f"{max(1, len(owner))} entries"
            message = f"{name} must have {expected}, got {len(given)}"
            raise InputError(message, field=name, given=len(given), expected=expected)
    if not stages:
        message = "stages must have the record of at least one stage, got none"
        raise InputError(message, field="stages", given=stages, expected="at least one record")

    judges, codebook = Judges(real), measure_codebook(code_counts_SV)
    of_samples = [
        judges.measure(drawn) | measure_validation(curve, codebook["log_v"]) for drawn, curve in sets.values()
    ]
    return {
        **measure_reconstructions(real.heldout, reconstructions),
        **codebook,
        "judge_real_accuracy": judges.accuracy(real.heldout, real.heldout_labels),
        **measure_bounds(judges, reconstructions),
        **of_samples[-1],
        **measure_stages(stages),
        **({} if refined is None else {"base": of_samples[0]}),
    }


def check_requirements(figures: Mapping) -> list[dict]:
    """Return one row for each of REQUIREMENTS; a figure that is NaN fails."""
    rows = []
    for figure, direction, bound, meaning in REQUIREMENTS:
        limit = figures[bound] if isinstance(bound, str) else bound
        passed = bool(COMPARE[direction](figures[figure], limit))
        row = {"figure": figure, "value": figures[figure], "direction": direction, "bound": limit}
        rows.append({**row, "passed": passed, "meaning": meaning})
    return rows


def _finite(value):
    """Replace infinity and NaN, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    def text(cell) -> str:
        return f"{cell:.4g}" if isinstance(cell, float) and abs(cell) < 1000 else f"{cell:.0f}"

    lines = [header, ("---",) * len(header)]
    lines += [tuple(cell if isinstance(cell, str) else text(cell) for cell in row) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _scales(figures: Mapping) -> str:
    """Return the section of the scales: the codes, the transformer's losses and, if there is a refiner, its own."""
    transformer = figures.get("base", figures)
    columns = {
        "codes used": figures["usage_per_scale"],
        "perplexity": figures["perplexity_per_scale"],
        "loss at start": transformer["val_loss_start_per_scale"],
        "loss at end": transformer["val_loss_end_per_scale"],
        "own entropy": transformer["val_entropy_per_scale"],
        "end / log V": transformer["val_loss_end_over_log_v_per_scale"],
    }
    if "base" in figures:
        columns["refined loss"] = figures["val_loss_end_per_scale"]
        columns["own entropy, refined"] = figures["val_entropy_per_scale"]
    rows = [(str(scale), *row) for scale, row in enumerate(zip(*columns.values(), strict=True))]
    start, end = transformer["val_steps"]
    words = f"## Scales\n\nValidation loss of the transformer in nats a token, at steps {start} and {end}.\n"
    words += "An entropy below the loss shows a model that is surer than it is right.\n"
    return f"{words}\n{_table(('scale', *columns), rows)}"


def _markdown(figures: Mapping, rows: list[dict]) -> str:
    requirements = [
        (row["figure"], row["value"], row["direction"], row["bound"], "pass" if row["passed"] else "FAIL")
        + (row["meaning"],)
        for row in rows
    ]
    sections = [_table(("figure", "measured", "", "bound", "result", "meaning"), requirements)]
    base = {name: x for name, x in figures.get("base", {}).items() if isinstance(x, int | float)}
    if base:
        both = [(name, value, figures[name]) for name, value in base.items() if value != figures[name]]
        sections.append("## Refiner\n\nSamples of the same seed, options and number, and validation losses.\n")
        sections.append(_table(("figure", "transformer alone", "with the refiner"), both))
    stages = [(name, *record.values()) for name, record in figures["stages"].items()]
    stages.append(("training and sampling", figures["total_s"], figures["total_cpu_s"], figures["peak_rss_mib"]))
    shown = {row["figure"] for row in rows}
    others = [
        (name, value) for name, value in figures.items() if name not in shown and isinstance(value, int | float)
    ]
    sections += [_scales(figures), "## Stages\n", _table(("stage", "wall s", "CPU s", "peak MiB"), stages)]
    sections += ["## Further figures\n", _table(("figure", "measured"), others)]
    return "\n".join(
        [f"# Report: {sum(row['passed'] for row in rows)} of {len(rows)} requirements passed\n", *sections]
    )


def write_report(out_dir: str | os.PathLike, figures: Mapping) -> bool:
    """Write report.json and report.md, each atomically; return whether every requirement is met."""
    out_dir = as_path(out_dir, "out")
    rows = check_requirements(figures)
    passed = all(row["passed"] for row in rows)
    content = _finite({"passed": passed, "requirements": rows, "figures": figures})
    texts = {
        "report.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "report.md": _markdown(figures, rows),
    }
    for name, text in texts.items():
        write_atomically(out_dir / name, text)
    return passed
