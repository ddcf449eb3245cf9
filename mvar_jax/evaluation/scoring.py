"""Scores of samples against a reference: features in parts by all processes, then scores by the first one."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.evaluation.class_score import inception_score
from mvar_jax.evaluation.feature_folder import PART_IMAGES, FeatureFolder
from mvar_jax.evaluation.features import FeatureExtractor, default_batch_size
from mvar_jax.evaluation.inception import POOL_WIDTH
from mvar_jax.evaluation.manifolds import precision_recall
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.evaluation.reference import Gaussian, save_reference
from mvar_jax.evaluation.sample_sets import SampleSet
from mvar_jax.evaluation.statistics import frechet_distance_of_moments
from mvar_jax.files.atomic import write_json
from mvar_jax.files.npz import Pieces
from mvar_jax.processes import group
from mvar_jax.progress import Progress

SAVING_FILE = "saving.json"  # of unfinished work; from here on the file of --save_reference is its own
SHUFFLE_SEED = 0  # of the order in which the inception score is taken
NOT_KNOWN = "not known"
MIN_IMAGES = 4  # three neighbours and the image itself
MANIFOLD_IMAGES = 10_000  # of a reference that is computed here, as in the published ones
READ_IMAGES = 256
GAUSSIANS = {"fid": "pool", "sfid": "spatial"}  # the features of a score
MANIFOLD_SCORES = ("precision", "recall")


@dataclass(frozen=True)
class ReferenceSet:
    """What samples are compared with.

    Attributes:
      pool, spatial: statistics; both None if they are to be computed from the images.
      images: None if there are only statistics.
      num_manifold: images for precision and recall, spread evenly over the set.
      about: JSON values that tell this reference from others, by the option that named it.
      network: name -> SHA-256 of the files of the network of the statistics; {} if it is not known.
    """

    name: str
    pool: Gaussian | None
    spatial: Gaussian | None
    images: SampleSet | None
    num_manifold: int
    about: Mapping[str, Any]
    network: Mapping[str, str]

    @property
    def manifold_numbers(self) -> np.ndarray:
        num_images = self.images.num_images if self.images else 0
        return np.arange(self.num_manifold) * num_images // max(self.num_manifold, 1)


@dataclass(frozen=True)
class Comparison:
    """Samples, what they are compared with, and how.

    Attributes:
      samples: None computes the reference alone.
      weights: of the Inception network.
      asked: names of the scores.
      dtype: of the network for the samples; the reference's features are float32 always.
      batch_size: images of a device and batch; None for what fills it.
      saves_to: file for the reference that is computed; None if it is not kept.
      reads_ahead: read images while the network computes; False if the reading of the samples is timed.
    """

    samples: SampleSet | None
    reference: ReferenceSet
    weights: NetworkWeights
    asked: tuple[str, ...]
    dtype: str = "float32"
    batch_size: int | None = None
    saves_to: Path | None = None
    reads_ahead: bool = True

    def run(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (scores, findings) in the first process; the others help with the features.

        folder: for unfinished work, the same for all processes.
        """
        reference, samples = self.reference, None
        wanted = {*GAUSSIANS} if self.saves_to else {*GAUSSIANS} & {*self.asked}
        needs_manifold = {*MANIFOLD_SCORES} & {*self.asked}
        if self.samples is not None:
            samples = self._fill(folder / "samples", self.samples, self.dtype)
        references = None
        if needs_manifold or (wanted and reference.pool is None):
            references = self._fill(folder / "reference", reference.images, "float32")
        group.current().wait_for_all("the features")
        if group.current().index:
            return {}, {}
        if wanted:
            _say("statistics of the features")
        gaussians = {"fid": reference.pool, "sfid": reference.spatial}
        for name in wanted if reference.pool is None else ():
            gaussians[name] = Gaussian.of(references.moments(GAUSSIANS[name]))
        scores: dict[str, Any] = {}
        findings: dict[str, Any] = {}
        if samples is not None:
            for name in {*GAUSSIANS} & {*self.asked}:
                scores[name] = _distance(samples.moments(GAUSSIANS[name]), gaussians[name])
            if "inception_score" in self.asked:
                scores["inception_score"], findings = _inception_scores(samples.array("probabilities"))
            if needs_manifold:
                num = reference.num_manifold
                _say(f"precision and recall of {samples.num_images} samples and {num} references")
                rows_MD = references.array("pool", reference.manifold_numbers)
                progress = folder / "precision_recall.npz"
                pair = precision_recall(rows_MD, samples.array("pool"), progress=progress)
                scores |= {k: v for k, v in zip(MANIFOLD_SCORES, pair, strict=True) if k in self.asked}
            if self.dtype != "float32" and "fid" in self.asked:
                findings |= self._compare_dtypes(folder / "float32", samples, gaussians["fid"])
        if self.saves_to is not None:
            write_json(folder / SAVING_FILE, {"save_reference": str(self.saves_to)})
            self._save_reference(gaussians["fid"], gaussians["sfid"])
        return scores, findings

    def describe(self) -> dict[str, Any]:
        """Return the settings of the samples and of the reference."""
        samples, reference = self.samples, self.reference
        settings: dict[str, Any] = {}
        if samples is not None:
            rounding = {True: "down", False: "to the nearest"}.get((samples.sampling or {}).get("truncate_uint8"))
            settings["samples"] = {
                "source": samples.name,
                "num_samples": samples.num_images,
                "image_size": "{} x {}".format(*samples.size),
                "classes": samples.class_balance() or NOT_KNOWN,
                "rounding": rounding or NOT_KNOWN,
                "num_jpeg": samples.num_jpeg,
                "order": f"inception score of a fixed shuffle (seed {SHUFFLE_SEED}), in parts of 5000",
            }
            settings["sampling"] = dict(samples.sampling or {}) or NOT_KNOWN
            settings["features"] = self.dtype
        images = reference.images
        settings["reference"] = {
            "source": reference.name,
            "statistics": f"of {images.num_images} images" if reference.pool is None and images else "stored in it",
            "manifold_images": reference.num_manifold,
            "network": dict(reference.network) or NOT_KNOWN,
        }
        return settings

    def _fill(self, path: Path, images: SampleSet, dtype: str, num_images: int | None = None) -> FeatureFolder:
        """Compute the features that are missing and this process's; num_images: only of the first ones, here."""
        here = group.current()
        process = (here.index, here.count) if num_images is None else (0, 1)
        folder = FeatureFolder(path, num_images or images.num_images)
        parts = range(process[0], folder.num_parts, process[1])
        missing = folder.find_missing(parts)
        total = sum(len(folder.rows(part)) for part in parts)
        if not missing:
            return folder
        num_rows = max(len(folder.rows(part)) for part in missing)
        batch_size = self.batch_size or min(default_batch_size(), -(-num_rows // jax.local_device_count()))
        extractor = FeatureExtractor(self.weights, batch_size, dtype)
        done = total - sum(len(folder.rows(part)) for part in missing)
        with Progress(f"features of {path.name}", total, "image", done=done, is_shown=here.index == 0) as progress:

            def read(rows: range) -> np.ndarray:
                pixels = images.read(rows)
                progress.update(len(rows))
                return pixels

            folder.fill(extractor, read, missing, self.reads_ahead)
        return folder

    def _compare_dtypes(self, path: Path, samples: FeatureFolder, reference: Gaussian) -> dict[str, Any]:
        """Return what the dtype changes in FID, measured on the first samples."""
        num = min(PART_IMAGES, samples.num_images)
        exact = self._fill(path, self.samples, "float32", num).moments("pool")
        change = _distance(Moments.of(next(samples.parts("pool"))), reference) - _distance(exact, reference)
        return {"fid_change_by_dtype": change, "fid_change_measured_on": num}

    def _save_reference(self, pool: Gaussian, spatial: Gaussian) -> None:
        images, numbers = self.reference.images, self.reference.manifold_numbers

        def parts():
            for number in numbers.tolist():
                yield images.read(range(number, number + 1))

        pieces = Pieces((len(numbers), *images.size, 3), np.dtype(np.uint8), parts())
        save_reference(self.saves_to, pool, spatial, pieces, self.weights.sources)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _distance(moments: Moments, reference: Gaussian) -> float:
    return frechet_distance_of_moments(moments.mean_D, moments.covariance_DD, *reference)


def _inception_scores(probabilities_NK: np.ndarray) -> tuple[float, dict[str, Any]]:
    """Return the score of a fixed shuffle, and that of the files' order."""
    shuffle = np.random.default_rng(SHUFFLE_SEED).permutation(len(probabilities_NK))
    in_file_order = inception_score(probabilities_NK)
    return inception_score(probabilities_NK[shuffle]), {"inception_score_in_file_order": in_file_order}


def find_warnings(comparison: Comparison) -> list[str]:
    """Return why the scores will not compare with published ones, as far as it is known before computing."""
    samples, reference, found = comparison.samples, comparison.reference, []
    computed = reference.images if reference.pool is None else None
    for what, images in {"samples": samples, "reference images": computed}.items():
        if images is not None and {*GAUSSIANS} & {*comparison.asked} and images.num_images <= POOL_WIDTH:
            found.append(
                f"{images.num_images} {what} are fewer than the {POOL_WIDTH + 1} that a covariance of {POOL_WIDTH} "
                "features needs: FID and sFID are too large to compare with those of other numbers"
            )
    if reference.pool is not None and reference.spatial is None:
        found.append(
            f"{reference.name} has no spatial statistics, as pytorch-fid writes them, whose resizing and so features "
            "are others"
        )
    found += find_label_warnings(samples) if samples else []
    if samples and samples.num_jpeg:
        found.append(f"{samples.num_jpeg} of {samples.num_images} samples are JPEG files, whose losses change scores")
    if comparison.weights.is_published is False:
        found.append("the Inception weights are not the published file: compare only with scores by the same file")
    if comparison.dtype != "float32":
        found.append(f"features in {comparison.dtype} give other scores than float32")
    return found


def find_label_warnings(samples: SampleSet) -> list[str]:
    """Return why samples of these labels are no even mixture of all classes, as far as the labels are known."""
    found, balance = [], samples.class_balance()
    if balance is None:
        return found
    num, num_model = balance["num_classes"], samples.num_model_classes
    if num_model is not None and num < num_model:
        found.append(
            f"the labels are {num} of the model's {num_model} classes: the scores are of these classes alone"
        )
    if balance["fewest"] != balance["most"]:
        found.append(
            f"the labels are unbalanced, {balance['fewest']} to {balance['most']} images of each of {num} classes: "
            "the scores are of this mixture"
        )
    return found


def check_sets(samples: SampleSet | None, reference: ReferenceSet, asked: tuple[str, ...]) -> None:
    """Raise InputError if the reference lacks what a score needs, or images are too few or of another size."""
    lacks = {}
    if reference.images is None:
        lacks |= dict.fromkeys(MANIFOLD_SCORES, "images (arr_0)")
    if reference.pool is not None and reference.spatial is None:
        lacks["sfid"] = "statistics of the spatial features (mu_s, sigma_s)"
    for name in asked:
        if name in lacks:
            others = ",".join(name for name in asked if name not in lacks)
            message = f"reference={reference.name} has no {lacks[name]} for {name}; use another one"
            message += f", or leave it out by --scores {others}" if others else ""
            raise InputError(message, field="reference", given=reference.name, expected=lacks[name])
    for field, images in {"samples": samples, "reference": reference.images}.items():
        if images is not None and images.num_images < MIN_IMAGES:
            expected = f"at least {MIN_IMAGES} images"
            message = f"{field} must have {expected}, got {images.num_images}"
            raise InputError(message, field=field, given=images.num_images, expected=expected)
    theirs = reference.images
    if samples is not None and theirs is not None and samples.size != theirs.size:
        given, expected = ("{} x {} pixels".format(*x.size) for x in (samples, theirs))
        message = (
            f"samples must have the reference's {expected}, got {given}; resize neither: draw samples of its size"
        )
        raise InputError(message, field="samples", given=given, expected=expected)
