"""The scorer of samples or reconstructions that a config asks for."""

import dataclasses

from mvar_jax.data.options import DataOptions
from mvar_jax.errors import InputError
from mvar_jax.fields import put_below
from mvar_jax.ops.pixels import check_scored
from mvar_jax.training.scoring import Scorer
from mvar_jax.training.task import RunOptions

# keys that say how samples are drawn and what they are compared with
OF_SAMPLES = ("eval_reference", "eval_cfg", "eval_top_k", "eval_top_p", "eval_temperature")


def make_scorer(
    kind: str, run: RunOptions, data: DataOptions, image_size: int, num_val: int, channels: int = 3
) -> Scorer | None:
    """Return the scorer of a run, None if it scores no images.

    Args:
      kind: what is trained, tokenizer or transformer.
      run, data: options of the run.
      image_size: side of the model's images.
      num_val: validation images.
      channels: of the model's images.

    Raises InputError if a file is missing, damaged or of other images, or a key means nothing for this run.
    """
    if not run.eval_samples:
        return None
    if run.eval_inception:
        check_scored(channels, "config.eval_inception")
    if kind == "tokenizer":
        return _scorer_of_reconstructions(run, num_val)
    if data.source == "digits" and not (run.eval_inception or run.eval_reference):
        from mvar_jax.digits.scorer import DigitScorer

        return DigitScorer(image_size, data.split_seed, data.val_fraction, run.eval_samples)
    return _scorer_of_samples(run, image_size)


def _scorer_of_samples(run: RunOptions, image_size: int) -> Scorer:
    from mvar_jax.evaluation.reference import read_reference
    from mvar_jax.evaluation.scorers import SampleScorer

    if not run.eval_reference:
        expected = "the .npz of a reference, with mu and sigma or with images as arr_0"
        words = f"config.eval_reference must be {expected} if eval_samples is {run.eval_samples}, got ''"
        raise InputError(words, field="config.eval_reference", given="", expected=expected)
    reference = read_reference(run.eval_reference, "config.eval_reference")
    if reference.images is not None and reference.images.shape[1:3] != (image_size, image_size):
        given, expected = "{} x {}".format(*reference.images.shape[1:3]), f"{image_size} x {image_size}, the model's"
        words = f"config.eval_reference={run.eval_reference} must hold images of {expected}, got {given}"
        raise InputError(words, field="config.eval_reference", given=given, expected=expected)
    return SampleScorer(_open_inception(run), reference, run.eval_samples)


def _scorer_of_reconstructions(run: RunOptions, num_val: int) -> Scorer:
    from mvar_jax.evaluation.scorers import ReconstructionScorer

    defaults = {field.name: field.default for field in dataclasses.fields(RunOptions)}
    for name in OF_SAMPLES:
        if (given := getattr(run, name)) != defaults[name]:
            words = f"config.{name} means nothing for a tokenizer, whose reconstructions are compared with the "
            words += f"originals, got {given!r}; remove it"
            raise InputError(words, field=f"config.{name}", given=given, expected=repr(defaults[name]))
    if run.eval_samples > num_val:
        expected = f"at most {num_val}, the number of validation images"
        words = f"config.eval_samples must be {expected}, got {run.eval_samples}"
        raise InputError(words, field="config.eval_samples", given=run.eval_samples, expected=expected)
    return ReconstructionScorer(_open_inception(run), run.eval_samples)


def _open_inception(run: RunOptions):
    """Return the network on this process's devices. Raises InputError as `load_inception`."""
    from mvar_jax.evaluation.features import FeatureExtractor, default_batch_size
    from mvar_jax.evaluation.inception_weights import COMMAND, DOWNLOAD, load_inception
    from mvar_jax.evaluation.network_files import missing

    if not run.eval_inception:
        raise missing("config.eval_inception", "''", (DOWNLOAD,), COMMAND)
    try:
        weights = load_inception(run.eval_inception)
    except InputError as error:
        raise put_below(error, "config.eval", "_") from None
    return FeatureExtractor(weights, min(default_batch_size(), run.eval_samples))
