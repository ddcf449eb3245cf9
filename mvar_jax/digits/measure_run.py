"""Measurement of a digits run on the real held-out fifth, from the files that its stages wrote."""

import itertools
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from mvar_jax.api import load
from mvar_jax.checkpoints.model_directory import DTYPES
from mvar_jax.digits.curves import Curves, plot_curves
from mvar_jax.digits.quality import Real, Samples
from mvar_jax.digits.report import Validation, measure, write_report
from mvar_jax.digits.splits import load_splits
from mvar_jax.errors import InputError, shorten
from mvar_jax.evaluation.reconstruction import reconstruct
from mvar_jax.files.images import save_png, side_by_side, tile_grid, to_uint8
from mvar_jax.files.json_files import read_json
from mvar_jax.files.lines import read_lines
from mvar_jax.files.npz import load_npz, save_npz
from mvar_jax.models.networks import Networks
from mvar_jax.processes.holding import OUTPUTS
from mvar_jax.sampling.bulk import SAMPLES_FILE, TOKENS_FILE
from mvar_jax.sampling.order import identify_weights
from mvar_jax.scales import areas_of
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


def load_digits(workdir: Path, channels: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the run's data by split, not augmented: (images `[N, Y, X, channels] uint8`, labels `[N]`).

    channels: those of the run's tokenizer. Raises InputError if the run did not train on the digits.
    """
    try:
        data = read_json(workdir / "config.json", DigitsConfig)["data"]
    except (OSError, ValueError) as error:
        message = f"--transformer={workdir} has no readable config.json: {shorten(error)}"
        raise InputError(message, field="transformer", given=str(workdir), expected="a training workdir") from None
    if data["source"] != "digits":
        message = f"--transformer={workdir} must be a run on the digits, but it is a run on {data['source']}"
        raise InputError(message, field="transformer", given=str(workdir), expected="a run on the digits")
    return load_splits(data["image_size"], data["split_seed"], data["val_fraction"], channels)


def sample_grid(model, seed: int) -> np.ndarray:
    """Return a grid of samples, one row per class, `[Y, X, 3] uint8`; the first samples of the seed, not selected."""
    labels = np.repeat(np.arange(model.num_classes), IMAGES_PER_CLASS)
    images, _ = model.sample(labels, seed=seed, cfg=GRID_CFG)
    return tile_grid(to_uint8(images), IMAGES_PER_CLASS, zoom=2)


class Drawn(NamedTuple):
    """A run that predicts token ids, and samples of it.

    workdir: of the transformer or its refiner. samples: output of `sample --save_tokens`. field: name of the option
    that gave the samples, for errors.
    """

    workdir: Path
    samples: Path
    field: str = "samples"

    def check_samples(self, networks: Networks) -> None:
        """Raise InputError unless the samples have tokens and these networks drew them, with their refiner if any."""
        path, names = self.samples, (OUTPUTS["sample"].identity, SAMPLES_FILE, TOKENS_FILE)
        if missing := [name for name in names if not (path / name).exists()]:
            expected = "a finished folder of `mvar sample --save_tokens`"
            message = f"--{self.field}={path} must be {expected}, but has no {missing[0]}"
            raise InputError(message, field=self.field, given=str(path), expected=expected)
        try:
            drawn = read_json(path / names[0], dict[str, Any])
        except (OSError, ValueError) as error:
            message = f"--{self.field}={path} has a damaged {names[0]}: {shorten(error)}; draw the samples again"
            raise InputError(message, field=self.field, given=str(path), expected="a readable file") from None
        found = {name: drawn.get(name) for name in ("checkpoint", "refiner", "switch")}
        if not any(found == identify_weights(possible) for possible in _drawers(networks, str(drawn.get("dtype")))):
            expected = f"samples of the last checkpoint of {self.workdir}"
            expected += " with its refiner" if networks.refiner is not None else ", without a refiner"
            message = f"--{self.field}={path} must hold {expected}, but other weights drew them; draw them again"
            raise InputError(message, field=self.field, given=str(path), expected=expected)

    def read_samples(self) -> Samples:
        """Return the samples."""
        images, tokens = (load_npz(self.samples / name) for name in (SAMPLES_FILE, TOKENS_FILE))
        return Samples(images["arr_0"], images["arr_1"], tokens["ids"])

    def validate(self, ids_NL, labels_N) -> Validation:
        """Return the validation curve, and the entropy of the run's model on the held-out images."""
        lines, model = read_metrics(self.workdir, "eval"), load(self.workdir)
        (steps, per_scale), (_, whole) = (column(lines, name) for name in ("loss_per_scale", "loss"))
        entropy_NS = np.asarray(model.entropy(ids_NL, labels_N))
        return Validation(steps, per_scale, whole, entropy_NS.mean(0) / areas_of(model.tokenizer.sides))


def _drawers(networks: Networks, dtype: str) -> Iterator[Networks]:
    """Yield the networks in each form in which `sample` draws: dtypes of weights, scales of the refiner."""
    name = dtype.partition(",")[0]
    for cast in (networks, networks.with_dtype(name)) if name in DTYPES else (networks,):
        yield cast
        scales = cast.refiner.refined if cast.refiner is not None else ()
        for num in range(1, len(scales)):
            yield from (cast.with_refiner(scales=some) for some in itertools.combinations(scales, num))


def report_digits(tokenizer_dir: Path, base: Drawn, refined: Drawn | None, stages: dict, out: Path) -> bool:
    """Measure a run and write its report; return whether every requirement is met.

    Writes report.md, report.json, samples.png, reconstructions.png, curves.png and samples.npz into `out`. The
    samples are those of the refiner if there is one.

    Args:
      base: of the transformer.
      refined: of its refiner; None: the run has no refiner.
      stages: the log of launch/stage.py.

    Raises InputError before anything is computed if samples lack their tokens or other weights drew them.
    """
    began_s = time.monotonic()
    best = refined or base
    model = load(best.workdir)
    best.check_samples(model.networks)
    if refined is not None:
        base.check_samples(load(base.workdir).networks)
    splits = load_digits(base.workdir, model.tokenizer.channels)
    real = Real(*splits["train"], *splits["val"])
    train, heldout = real.train, real.heldout
    samples = best.read_samples()

    both, ids_NL = reconstruct(model, np.concatenate([heldout, train]), batch_size=64)
    reconstructions = both[: len(heldout)]
    hits_SV = np.asarray(count_hits(ids_NL, model.tokenizer.sides, model.tokenizer.vocab_size))
    of_heldout = ids_NL[: len(heldout)], real.heldout_labels
    validation = base.validate(*of_heldout)
    tokenizer_lines = read_metrics(tokenizer_dir, "eval")
    # without the untrained tokenizer, whose PSNR would dominate the axis
    tokenizer_lines = [line for line in tokenizer_lines if line["step"]]

    save_png(out / "samples.png", sample_grid(model, seed=0))
    save_png(
        out / "reconstructions.png",
        side_by_side(heldout[:40], to_uint8(reconstructions[:40]), 8, zoom=2),
    )
    curves = Curves(
        validation_loss=(validation.steps_K, validation.loss_KS),
        training_loss=column(read_metrics(base.workdir, "train"), "loss"),
        tokenizer_psnr_db=column(tokenizer_lines, "psnr_db"),
        tokenizer_usage_percent=column(tokenizer_lines, "codebook_used_percent"),
        patch_nums=model.tokenizer.sides,
        num_codes=model.tokenizer.vocab_size,
    )
    plot_curves(out / "curves.png", curves)
    save_npz(out / "samples.npz", arr_0=samples.images, arr_1=samples.labels)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own = {
        "wall_s": time.monotonic() - began_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),  # bytes there, else KiB
    }
    figures = measure(
        real=real,
        reconstructions=reconstructions,
        samples=samples if refined is None else base.read_samples(),
        code_counts_SV=hits_SV,
        validation=validation,
        stages={**stages, "report": own},
        refined=None if refined is None else (samples, refined.validate(*of_heldout)),
    )
    figures["num_heldout_images"], figures["jax_version"] = len(heldout), jax.__version__
    return write_report(out, figures)
