"""Published scores of 50,000 samples of 256 x 256 pixels, and the sampling options that they were measured with."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

NUM_SAMPLES, NUM_CLASSES, IMAGE_SIZE = 50_000, 1000, "256 x 256"


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
      depth, conditioning: of its transformer.
      options: sampling options by the names of the command's options.
      scores: published figures by the names of `report.SCORES`.
    """

    depth: int
    conditioning: str
    options: Mapping[str, Any]
    scores: Mapping[str, float]


def _mvar(depth: int, cfg: float, top_p: float, top_k: int, *scores: float) -> Preset:
    names = ("fid", "inception_score", "sfid", "precision", "recall")
    # the published program rounds pixels down
    options = {"cfg": cfg, "top_p": top_p, "top_k": top_k, "truncate_uint8": True}
    return Preset(depth, "markov", MappingProxyType(options), MappingProxyType(dict(zip(names, scores, strict=True))))


def _var(depth: int, fid: float) -> Preset:
    options = {"cfg": 1.5, "top_p": 0.96, "top_k": 900}
    return Preset(depth, "full", MappingProxyType(options), MappingProxyType({"fid": fid}))


# MVAR: model card of the released weights, "-ft" fine-tuned from VAR. VAR: arXiv 2404.02905.
PRESETS = {
    "mvar-d16": _mvar(16, 2.7, 0.99, 1200, 3.01, 285.17, 6.26, 0.85, 0.51),
    "mvar-d16-ft": _mvar(16, 2.0, 0.99, 1200, 3.37, 295.35, 6.10, 0.86, 0.48),
    "mvar-d20-ft": _mvar(20, 1.5, 0.96, 900, 2.83, 294.31, 6.12, 0.85, 0.52),
    "mvar-d24-ft": _mvar(24, 1.4, 0.96, 900, 2.15, 298.85, 5.62, 0.84, 0.56),
    "var-d16": _var(16, 3.55),
    "var-d20": _var(20, 2.95),
    "var-d24": _var(24, 2.33),
    "var-d30": _var(30, 1.97),
}
