"""`evaluate --samples` and `evaluate --checkpoint`: scores of samples against a reference."""

import contextlib
import json
from typing import Any

from mvar_jax.errors import InputError


def prepare(door: str, args, stack: contextlib.ExitStack):
    """Check samples, reference and networks; return the `Job`."""
    from mvar_jax.cli.sampling import check_positive
    from mvar_jax.evaluation.inception_weights import load_inception
    from mvar_jax.evaluation.published import PRESETS
    from mvar_jax.evaluation.report import Evaluation, Job, common_settings
    from mvar_jax.evaluation.sample_sets import open_samples
    from mvar_jax.evaluation.scoring import Comparison, check_sets, find_warnings
    from mvar_jax.files.paths import as_path

    if args.inception_batch is not None:
        check_positive(args, "inception_batch")
    asked = scores_of(args.scores)
    samples = open_samples("samples", as_path(args.samples, "samples"), stack) if args.samples else None
    reference, network = open_reference(args, samples, stack)
    check_sets(samples, reference, asked)
    weights = load_inception(args.inception)
    if network and set(network.values()) != set(weights.sources.values()):
        given, expected = (", ".join(x.values()) for x in (weights.sources, network))
        message = f"reference={reference.name} is of features of another network, SHA-256 {expected}; got {given}"
        raise InputError(message, field="reference", given=given, expected=expected)
    dtype = args.inception_dtype or "float32"
    warnings = tuple(find_warnings(samples, reference, weights, asked, dtype))
    comparison = Comparison(samples, reference, weights, asked, dtype, args.inception_batch)
    identity = {"samples": json.dumps(samples.about), "inception": [*weights.sources.values()], "scores": [*asked]}

    def run(folder) -> Evaluation:
        scores, findings = comparison.run(folder)
        settings = {"samples": samples.name} | findings | common_settings({"inception": weights})
        return Evaluation(scores, settings, warnings=warnings)

    return Job(identity, warnings, run)


def scores_of(text: str | None) -> tuple[str, ...]:
    """Return the names of the scores that are asked for. Raises InputError for an unknown one."""
    from mvar_jax.evaluation.report import ALWAYS_WRITTEN

    if text is None:
        return ALWAYS_WRITTEN
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ALWAYS_WRITTEN:
            expected = ", ".join(ALWAYS_WRITTEN)
            message = f"--scores must be of {expected}, got {name!r}"
            raise InputError(message, field="scores", given=name, expected=expected)
    return tuple(name for name in ALWAYS_WRITTEN if name in names)


def open_reference(args, samples, stack: contextlib.ExitStack) -> tuple[Any, dict[str, str]]:
    """Return the `ReferenceSet`, and the fingerprint of the network of its statistics."""
    from mvar_jax.evaluation.reference import read_reference
    from mvar_jax.evaluation.sample_sets import of_npz
    from mvar_jax.evaluation.scoring import ReferenceSet

    if args.reference is None:
        raise InputError("give --reference, what to compare with", field="reference", expected="a reference")
    found = read_reference(args.reference)
    images = of_npz("reference", found.images.path, stack) if found.images else None
    return ReferenceSet(args.reference, found.pool, found.spatial, images, images.num_images if images else 0), found.network
