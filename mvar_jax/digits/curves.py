"""Training curves of a digits run, as one figure."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvar_jax.files.atomic import replacing

Curve = tuple[Sequence[float], Sequence]  # steps [K], values [K] or [K, number of lines]


@dataclass(frozen=True)
class Curves:
    """The curves of `plot_curves`; each is (steps, values) with its own steps."""

    validation_loss: Curve  # values [K, S], nats per token
    training_loss: Curve
    tokenizer_psnr_db: Curve  # held-out images
    tokenizer_usage_percent: Curve  # values [K], or [K, S] with one line per scale
    patch_nums: tuple[int, ...]
    num_codes: int


def plot_curves(path: str | os.PathLike, series: Curves) -> None:
    """Write a PNG of three panels: validation loss per scale (dotted: log V, guessing), training, tokenizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    validation, training, tokenizer = figure.subplots(1, 3)

    steps, loss_KS = series.validation_loss
    for side, loss_K in zip(series.patch_nums, np.asarray(loss_KS, np.float64).T, strict=True):
        validation.plot(steps, loss_K, marker=".", label=f"{side} x {side}")
    validation.axhline(math.log(series.num_codes), linestyle=":", color="black", label="log V")
    validation.set(title="validation loss per scale", xlabel="step", ylabel="nats per token", ylim=(0, None))
    validation.legend()

    training.plot(*series.training_loss)
    training.set(title="training loss", xlabel="step", ylabel="nats per token")

    tokenizer.plot(*series.tokenizer_psnr_db, color="tab:blue", marker=".")
    tokenizer.set(title="tokenizer", xlabel="step")
    tokenizer.set_ylabel("held-out PSNR, dB", color="tab:blue")
    usage = tokenizer.twinx()
    usage.plot(*series.tokenizer_usage_percent, color="tab:orange")
    usage.set_ylim(0, 102)
    usage.set_ylabel("codebook usage, %", color="tab:orange")

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
