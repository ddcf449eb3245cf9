"""The result of an evaluation: `evaluation.json`, and the same as text."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

import mvar_jax
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.fields import flatten
from mvar_jax.files.atomic import write_atomically, write_json
from mvar_jax.processes.cluster import describe

RESULT_FILE, TEXT_FILE = "evaluation.json", "evaluation.txt"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


class Score(NamedTuple):
    """How a score is shown."""

    title: str
    format: str


SCORES = {
    "fid": Score("FID", ".3f"),
    "sfid": Score("sFID", ".3f"),
    "inception_score": Score("inception score", ".3f"),
    "precision": Score("precision", ".4f"),
    "recall": Score("recall", ".4f"),
    "rfid": Score("rFID", ".3f"),
    "psnr": Score("PSNR, dB", ".3f"),
    "ssim": Score("SSIM", ".4f"),
    "lpips": Score("LPIPS", ".4f"),
    "usage_percent": Score("codes used, %", ".1f"),
    "perplexity": Score("perplexity of the codes", ".1f"),
}
SAMPLE_SCORES = ("fid", "sfid", "inception_score", "precision", "recall")  # written always, None if not asked for


@dataclass(frozen=True)
class Evaluation:
    """Scores and everything on which they depend.

    Attributes:
      scores: number by name, see SCORES; other JSON values are written and not shown.
      settings: JSON values by name, in sections or not.
      published: published figures by name of the score.
      published_as: whose figures they are.
      warnings: sentences on why the scores do not compare with others.
      notes: further sentences.
      details: text below the table.
    """

    scores: Mapping[str, Any]
    settings: Mapping[str, Any]
    published: Mapping[str, float] = field(default_factory=dict)
    published_as: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: str = ""


@dataclass(frozen=True)
class Job:
    """An evaluation that is checked and not begun.

    Attributes:
      identity: JSON values on which the result depends, by the names of the command's options.
      warnings: sentences on why the scores will not compare with others.
      run: folder for unfinished work -> the evaluation. All processes call it; the first one's result counts.
    """

    identity: Mapping[str, Any]
    warnings: tuple[str, ...]
    run: Callable[[Path], Evaluation]


def common_settings(networks: Mapping[str, NetworkWeights]) -> dict[str, Any]:
    """Return the settings of every evaluation: fingerprints of the networks by their names, versions and devices."""
    versions = {"mvar_jax": mvar_jax.__version__, **{name: version(name) for name in PACKAGES}}
    return {
        "networks": {
            name: {"files": dict(x.sources), "is_published": x.is_published} for name, x in networks.items()
        },
        "versions": versions | {"python": platform.python_version()},
        "device": describe(jax.devices(), {}),
    }


def write_evaluation(out: Path, evaluation: Evaluation) -> str:
    """Write evaluation.txt and, last, evaluation.json; return the text."""
    text = as_text(evaluation)
    write_atomically(out / TEXT_FILE, text)
    content = dict.fromkeys(SAMPLE_SCORES) | dict(evaluation.scores)
    content |= {"settings": dict(evaluation.settings), "published": dict(evaluation.published)}
    write_json(out / RESULT_FILE, content | {"warnings": [*evaluation.warnings], "notes": [*evaluation.notes]})
    return text


def as_text(evaluation: Evaluation) -> str:
    """Return the scores as a table with the published figures beside them, then warnings, notes and settings."""
    head = ("", "ours", f"published ({evaluation.published_as})" if evaluation.published else "")
    rows = [head]
    for name, score in SCORES.items():
        value = evaluation.scores.get(name)
        if value is not None or name in evaluation.published:
            ours = "-" if value is None else format(value, score.format)
            theirs = str(evaluation.published.get(name, "-")) if evaluation.published else ""
            rows.append((score.title, ours, theirs))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    said = [f"warning: {line}" for line in evaluation.warnings] + [f"note: {line}" for line in evaluation.notes]
    settings = [f"{name}: {value}" for name, value in flatten(dict(evaluation.settings))]
    parts = ["\n".join(lines) for lines in (table, evaluation.details.splitlines(), said, settings) if lines]
    return "\n\n".join(parts) + "\n"
