"""The scores of a tokenizer after each number of scales: a table, curves.csv and curves.png."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mvar_jax.files.atomic import replacing, write_atomically
from mvar_jax.scales import KNOWN_SIDES

CSV_FILE, PLOT_FILE = "curves.csv", "curves.png"
FORMATS = {
    "scales": "d",
    "side": "d",
    "usage_percent": ".1f",
    "possible_percent": ".1f",
    "margin_percent": ".1f",
    "perplexity": ".1f",
    "psnr": ".3f",
    "ssim": ".4f",
    "lpips": ".4f",
    "rfid": ".3f",
}
LEGEND = """\
usage_percent: codes that this scale chose at least once; possible_percent: the most that its tokens can choose
margin_percent: codes that this scale chose at least 0.08 times as often as the mean of all codes
psnr to rfid: of the images decoded after this number of scales
"""
# VAR's tokenizer, for reconstructions of the 50,000 validation images of ImageNet at 256 x 256 pixels
VAR_TOKENIZER = MappingProxyType({"sides": KNOWN_SIDES[256], "vocab_size": 4096, "code_width": 32, "ch": 160})
VAR_TOKENIZER_SCORES = MappingProxyType({"rfid": 0.92})
PANELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID"}


def table_of(by_scale: Sequence[Mapping[str, Any]]) -> str:
    """Return `by_scale` of `PartFolder.scores` as a text table, without the columns that are not computed."""
    names = [name for name in FORMATS if any(entry[name] is not None for entry in by_scale)]
    rows = [names]
    for entry in by_scale:
        rows.append(["-" if entry[name] is None else format(entry[name], FORMATS[name]) for name in names])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + "\n" + LEGEND


def write_curves(out: Path, by_scale: Sequence[Mapping[str, Any]]) -> None:
    """Write curves.csv, with a line for each scale and empty cells for what is not computed, and curves.png."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FORMATS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_scale)
    write_atomically(out / CSV_FILE, text.getvalue())
    _plot(out / PLOT_FILE, by_scale)


def _plot(path: Path, by_scale: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in PANELS if any(entry[name] is not None for entry in by_scale)]
    scales = [entry["scales"] for entry in by_scale]
    figure = Figure(figsize=(4.5 * (len(shown) + 1), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, codes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        points = [(entry["scales"], entry[name]) for entry in by_scale if entry[name] is not None]
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(title=PANELS[name], xlabel="number of scales", xticks=scales)
    for name, style in (("usage_percent", "-"), ("margin_percent", "--"), ("possible_percent", ":")):
        codes.plot(scales, [entry[name] for entry in by_scale], style, marker=".", label=name)
    codes.set(title="codebook", xlabel="scale", ylabel="codes, %", ylim=(0, 102), xticks=scales)
    codes.legend()
    perplexity = codes.twinx()
    perplexity.plot(scales, [entry["perplexity"] for entry in by_scale], color="black", marker="x")
    perplexity.set(ylabel="perplexity (x)", ylim=(0, None))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
