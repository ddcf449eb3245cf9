"""`evaluate --samples`, `--checkpoint` and `--save_reference`: scores of samples against a reference."""

import argparse
import contextlib
from typing import Any

from mvar_jax.errors import InputError
from mvar_jax.processes import group

SHOWN_CHANGE = 1e-5  # of the inception score by the order, relative
# options of `sample` that --checkpoint takes too, with the same defaults
SAMPLE_OPTIONS = ("which", "weight_shards", "seed", "batch_size", "truncate_uint8")
SAMPLE_OPTIONS += ("cfg", "top_k", "top_p", "temperature", "smooth", "refiner", "refine_scales", "switch")


def prepare(args, stack: contextlib.ExitStack):
    """Check samples, reference and networks; return the `Job`. Files that it opens close with the stack."""
    from mvar_jax.cli.sampling import check_positive
    from mvar_jax.evaluation.published import PRESETS
    from mvar_jax.evaluation.report import Evaluation, Job, common_settings
    from mvar_jax.evaluation.scoring import Comparison, check_sets, find_warnings
    from mvar_jax.files.paths import as_path

    is_reference_alone = args.samples is None and args.checkpoint is None
    if args.inception_batch is not None:
        check_positive(args, "inception_batch")
    preset = PRESETS.get(args.preset)
    asked, dtype = () if is_reference_alone else scores_of(args.scores), args.inception_dtype or "float32"
    weights = open_network(args)
    samples, sampler = open_samples(args, preset, stack)
    reference = open_reference(args, samples, stack)
    check_network(reference, weights)
    check_sets(samples, reference, asked)
    saves_to = None if args.save_reference is None else as_path(args.save_reference, "save_reference")
    if saves_to and reference.pool is not None:
        message = f"--save_reference needs images to compute it from; {reference.name} holds the statistics already"
        raise InputError(message, field="save_reference", given=args.save_reference, expected="images")
    comparison = Comparison(samples, reference, weights, asked, dtype, args.inception_batch, saves_to)
    warnings = tuple(
        find_warnings(comparison) + (find_misfits(args.preset, preset, samples, sampler) if preset else [])
    )
    inception = {"inception": sorted(weights.sources.values()), "inception_dtype": dtype}
    identity = {"scores": [*asked], "preset": args.preset, "save_reference": args.save_reference}
    identity |= {**inception, **reference.about, **(samples.about if samples else {})}
    settings = comparison.describe() | common_settings({"inception": weights})

    def run(folder) -> Evaluation:
        scores, findings = comparison.run(folder)
        notes = notes_on(scores, findings)
        published = preset.scores if preset else {}
        return Evaluation(scores, settings | findings, published, args.preset or "", warnings, notes)

    return Job(identity, warnings, run)


def open_network(args) -> Any:
    """Return the weights of --inception. Raises InputError if it is not given, or the file is of another network."""
    from mvar_jax.evaluation.inception_weights import COMMAND, DOWNLOAD, load_inception

    if args.inception is None:
        files = f"{DOWNLOAD.name} (SHA-256 {DOWNLOAD.sha256}...) from {DOWNLOAD.url}"
        message = f"give --inception: download {files}, then run `{COMMAND}`"
        raise InputError(message, field="inception", given=None, expected="a file")
    return load_inception(args.inception)


def scores_of(text: str | None) -> tuple[str, ...]:
    """Return the names of the scores that are asked for. Raises InputError for an unknown one."""
    from mvar_jax.evaluation.report import SAMPLE_SCORES

    names = SAMPLE_SCORES if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SAMPLE_SCORES:
            expected = ", ".join(SAMPLE_SCORES)
            message = f"--scores must be of {expected}, got {name!r}"
            raise InputError(message, field="scores", given=name, expected=expected)
    return tuple(name for name in SAMPLE_SCORES if name in names)


def open_samples(args, preset, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Return (the `SampleSet` or None, the transformer that draws it or None)."""
    from mvar_jax.evaluation.sample_sets import open_samples as open_stored
    from mvar_jax.files.paths import as_path

    if args.checkpoint is not None:
        return draw_samples(args, preset)
    if args.samples is None:
        return None, None
    samples = open_stored("samples", as_path(args.samples, "samples"), stack)
    print_notes(samples.notes)
    return samples, None


def print_notes(notes: tuple[str, ...]) -> None:
    """Print notes on images in the first process, a line each."""
    for note in notes if group.current().index == 0 else ():
        print(note, flush=True)


def draw_samples(args, preset) -> tuple[Any, Any]:
    """Return (the `SampleSet` of a model, drawn when it is read, its transformer)."""
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.cli.models import load_for_sampling
    from mvar_jax.cli.sampling import check_positive, sampling_options
    from mvar_jax.evaluation.published import NUM_SAMPLES
    from mvar_jax.evaluation.sample_sets import SampleSet
    from mvar_jax.files.paths import as_path
    from mvar_jax.ops.pixels import check_scored
    from mvar_jax.sampling.bulk import sample_reader
    from mvar_jax.sampling.order import Order

    fill_in(args, preset)
    num = NUM_SAMPLES if args.num_samples is None else args.num_samples
    args.num_samples = num
    check_positive(args, "num_samples", "batch_size", "weight_shards")
    options = sampling_options(args)
    names = class_names_of(as_path(args.checkpoint, "checkpoint"))
    labels = None if args.labels is None else names.numbers_of(args.labels)
    model, networks, mesh = load_for_sampling(args)
    check_scored(model.tokenizer.channels, "--inception")
    labels = model.labels(range(model.num_classes) if labels is None else labels)
    options.check_scales(len(model.tokenizer.sides))
    drawing = {"seed": args.seed, "batch_size": args.batch_size, "truncates": args.truncate_uint8}
    order = Order.of_total(tuple(labels.tolist()), num, options, **drawing)
    side, about = model.tokenizer.image_size, {"num_samples": num, **order.identity(networks)}
    read = sample_reader(networks, order, mesh)
    classes = {"labels_N": order.labels_N, "num_model_classes": model.num_classes}
    return SampleSet(args.checkpoint, num, (side, side), read, about, **classes, sampling=about), model.transformer


def fill_in(args, preset) -> None:
    """Set the options that were not given: to those of the preset, else as `sample`.

    Raises InputError if one was given and differs from the preset's.
    """
    from mvar_jax.cli import sample

    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    published = preset.options if preset else {}
    for name in SAMPLE_OPTIONS:
        given = getattr(args, name)
        if given is not None and given != published.get(name, given):
            expected = f"{published[name]}, as --preset {args.preset}"
            raise InputError(f"--{name} must be {expected}, got {given}", field=name, given=given, expected=expected)
        if given is None:
            setattr(args, name, published.get(name, parser.get_default(name)))


def open_reference(args, samples, stack: contextlib.ExitStack) -> Any:
    """Return the `ReferenceSet` that --reference names. Raises InputError if it cannot be used."""
    from mvar_jax.cli.sampling import check_positive
    from mvar_jax.evaluation.image_sets import open_images
    from mvar_jax.evaluation.reference import read_reference
    from mvar_jax.evaluation.sample_sets import of_image_set, of_npz
    from mvar_jax.evaluation.scoring import MANIFOLD_IMAGES, ReferenceSet
    from mvar_jax.files.paths import as_path

    text, expected = args.reference, "an .npz file, a folder of images or KIND:SPLIT[:WHERE]"
    if text is None:
        raise InputError(f"give --reference, {expected}", field="reference", given=None, expected=expected)
    if text.endswith(".npz"):
        if not as_path(text, "reference").exists():
            message = f"reference={text} is missing; docs/reproducing.md says where the published one is"
            raise InputError(message, field="reference", given=text, expected=expected)
        if args.image_size is not None:
            message = "--image_size cannot be combined with an .npz file, whose images are not cut"
            raise InputError(message, field="image_size", given=args.image_size, expected="no .npz file")
        found = read_reference(text)
        images = of_npz("reference", found.images.path, stack) if found.images else None
        num = images.num_images if images else 0
        stored = {"reference": found.checksums}
        return ReferenceSet(text, found.pool, found.spatial, images, num, stored, found.network)
    if samples is None and args.image_size is None:
        message = "give --image_size, the side to which the reference's images are cut"
        raise InputError(message, field="image_size", given=None, expected="a number of pixels")
    if samples is None:
        check_positive(args, "image_size")
    side = samples.size[0] if samples else args.image_size
    found = open_images(text, side, as_path(args.out, "out"), field="reference")
    print_notes(found.notes)
    images = of_image_set("reference", text, found, (side, side))
    num = min(MANIFOLD_IMAGES, images.num_images)
    return ReferenceSet(text, None, None, images, num, {"reference": dict(found.about)}, {})


def check_network(reference, weights) -> None:
    """Raise InputError if the reference's statistics are of another network's features, as far as it is known."""
    if reference.network and {*reference.network.values()} != {*weights.sources.values()}:
        given, expected = (", ".join(x.values()) for x in (weights.sources, reference.network))
        message = f"reference={reference.name} is of a network of SHA-256 {expected}; --inception is {given}"
        raise InputError(message, field="reference", given=given, expected=expected)


def find_misfits(name: str, preset, samples, transformer) -> list[str]:
    """Return what differs from the settings of the published scores."""
    from mvar_jax.evaluation.published import IMAGE_SIZE, NUM_CLASSES, NUM_SAMPLES

    found = {"num_samples": samples.num_images, "image_size": "{} x {}".format(*samples.size)}
    wanted: dict[str, Any] = {"num_samples": NUM_SAMPLES, "image_size": IMAGE_SIZE}
    if (balance := samples.class_balance()) is not None:
        found["num_classes"], wanted["num_classes"] = balance["num_classes"], NUM_CLASSES
    if samples.sampling:
        found |= samples.sampling
        wanted |= {"smooth": False, "temperature": 1.0, "refiner": None, "switch": None, **preset.options}
    if transformer is not None:
        found |= {"depth": transformer.depth, "conditioning": transformer.conditioning}
        wanted |= {"depth": preset.depth, "conditioning": preset.conditioning}
    differ = [key for key, value in wanted.items() if found.get(key, value) != value]
    shown = ", ".join(f"{key}={found[key]} in place of {wanted[key]}" for key in differ)
    return [f"the samples are not those of {name}: {shown}"] if differ else []


def notes_on(scores: dict[str, Any], findings: dict[str, Any]) -> tuple[str, ...]:
    """Return what else is to be said, as sentences."""
    notes, in_order = [], findings.get("inception_score_in_file_order")
    if in_order is not None and abs(in_order - scores["inception_score"]) > SHOWN_CHANGE * in_order:
        notes.append(f"in the order of the files the inception score would be {in_order:.3f}")
    if (change := findings.get("fid_change_by_dtype")) is not None:
        num = findings["fid_change_measured_on"]
        notes.append(f"the features' dtype changes FID by {change:+.4f}, measured on the first {num} samples")
    return tuple(notes)
