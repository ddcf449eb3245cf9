"""Measurement of a digits run on the real held-out fifth, from the files that its stages wrote."""

import resource
import time
from pathlib import Path
from typing import TypedDict

import jax
import numpy as np

from mvar_jax.api import load
from mvar_jax.digits.curves import Curves, plot_curves
from mvar_jax.digits.report import measure, write_report
from mvar_jax.digits.splits import load_splits
from mvar_jax.errors import InputError, shorten
from mvar_jax.evaluation.reconstruction import reconstruct
from mvar_jax.files.images import save_png, side_by_side, tile_grid, to_uint8
from mvar_jax.files.json_files import read_json
from mvar_jax.files.lines import read_lines
from mvar_jax.files.npz import load_npz, save_npz
from mvar_jax.training.tokenizer_step import count_hits

GRID_CFG = 1.0  # guidance of samples.png
IMAGES_PER_CLASS = 10


class DigitsData(TypedDict):
    """The section `data` of a run's config, as far as the report needs it."""

    source: str
    image_size: int
    split_seed: int
    val_fraction: float


class DigitsConfig(TypedDict):
    """The config of a run, as far as the report needs it."""

    data: DigitsData


def read_metrics(workdir: Path, kind: str) -> list[dict]:
    """Return the lines of one kind, "train" or "eval", of a run's metrics.jsonl, oldest first."""
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["kind"] == kind]


def column(lines: list[dict], name: str) -> tuple[list[int], list]:
    """Return (steps, values) of one metric."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def load_digits(workdir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the run's data by split, not augmented: (images `[N, Y, X, 3] uint8`, labels `[N]`).

    Raises InputError if the run did not train on the digits.
    """
    try:
        data = read_json(workdir / "config.json", DigitsConfig)["data"]
    except (OSError, ValueError) as error:
        message = f"--transformer={workdir} has no readable config.json: {shorten(error)}"
        raise InputError(message, field="transformer", given=str(workdir), expected="a training workdir") from None
    if data["source"] != "digits":
        message = f"--transformer={workdir} must be a run on the digits, but it is a run on {data['source']}"
        raise InputError(message, field="transformer", given=str(workdir), expected="a run on the digits")
    return load_splits(data["image_size"], data["split_seed"], data["val_fraction"])


def sample_grid(model, seed: int) -> np.ndarray:
    """Return a grid of samples, one row per class, `[Y, X, 3] uint8`; the first samples of the seed, not selected."""
    labels = np.repeat(np.arange(model.num_classes), IMAGES_PER_CLASS)
    images, _ = model.sample(labels, seed=seed, cfg=GRID_CFG)
    return tile_grid(to_uint8(images), IMAGES_PER_CLASS, zoom=2)


def report_digits(tokenizer_dir: Path, transformer_dir: Path, samples_dir: Path, stages: dict, out: Path) -> bool:
    """Measure a run and write its report; return whether every requirement is met.

    Writes report.md, report.json, samples.png, reconstructions.png, curves.png and samples.npz into `out`.
    stages: the log of launch/stage.py.
    """
    began_s = time.monotonic()
    model = load(transformer_dir)
    splits = load_digits(transformer_dir)
    (train, train_labels), (heldout, heldout_labels) = splits["train"], splits["val"]
    samples, tokens = (load_npz(samples_dir / name) for name in ("samples.npz", "tokens.npz"))

    both, ids_NL = reconstruct(model, np.concatenate([heldout, train]), batch_size=64)
    reconstructions = both[: len(heldout)]
    hits_SV = np.asarray(count_hits(ids_NL, model.tokenizer.sides, model.tokenizer.vocab_size))
    validation, training = (read_metrics(transformer_dir, kind) for kind in ("eval", "train"))
    tokenizer_lines = read_metrics(tokenizer_dir, "eval")
    # without the untrained tokenizer, whose PSNR would dominate the axis
    tokenizer_lines = [line for line in tokenizer_lines if line["step"]]

    save_png(out / "samples.png", sample_grid(model, seed=0))
    save_png(
        out / "reconstructions.png",
        side_by_side(heldout[:40], to_uint8(reconstructions[:40]), 8, zoom=2),
    )
    curves = Curves(
        validation_loss=column(validation, "loss_per_scale"),
        training_loss=column(training, "loss"),
        tokenizer_psnr_db=column(tokenizer_lines, "psnr_db"),
        tokenizer_usage_percent=column(tokenizer_lines, "codebook_used_percent"),
        patch_nums=model.tokenizer.sides,
        num_codes=model.tokenizer.vocab_size,
    )
    plot_curves(out / "curves.png", curves)
    save_npz(out / "samples.npz", **samples)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own = {
        "wall_s": time.monotonic() - began_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": usage.ru_maxrss / 1024,
    }
    figures = measure(
        train_images=train,
        train_labels=train_labels,
        heldout_images=heldout,
        heldout_labels=heldout_labels,
        reconstructions=reconstructions,
        samples=samples["arr_0"],
        sample_labels=samples["arr_1"],
        sample_ids_NL=tokens["ids"],
        code_counts_SV=hits_SV,
        validation_steps_K=column(validation, "loss_per_scale")[0],
        validation_loss_KS=column(validation, "loss_per_scale")[1],
        stages={**stages, "report": own},
    )
    figures["num_heldout_images"], figures["jax_version"] = len(heldout), jax.__version__
    return write_report(out, figures)
