"""`evaluate --tokenizer`: scores of a tokenizer's reconstructions."""

import json
from typing import Any

from mvar_jax.errors import InputError

BATCH_SIZE = 16  # images of a device


def prepare(args):
    """Check the tokenizer, the images and the networks; return the `Job`."""
    from mvar_jax.api import load
    from mvar_jax.checkpoints.model_directory import fingerprint
    from mvar_jax.cli.sampling import check_positive
    from mvar_jax.evaluation.image_sets import FORMS, open_images, require_usable
    from mvar_jax.evaluation.inception_weights import load_inception
    from mvar_jax.evaluation.lpips import load_lpips
    from mvar_jax.evaluation.report import Evaluation, Job, common_settings
    from mvar_jax.evaluation.tokenizer_scores import TokenizerScorer
    from mvar_jax.files.paths import as_path

    if args.images is None:
        raise InputError(f"--tokenizer needs --images: {FORMS}", field="images", given=None, expected=FORMS)
    if args.batch_size is not None:
        check_positive(args, "batch_size")
    directory, out = as_path(args.tokenizer, "tokenizer"), as_path(args.out, "out")
    networks = load(directory, args.which or "last", precision=args.precision).networks
    about = {"tokenizer": fingerprint(networks.tokenizer, networks.tokenizer_params)}
    networks = networks.replace(transformer=None, params=None).with_dtype(args.dtype or "float32")
    weights = {"inception": (args.inception, load_inception), "lpips": (args.lpips, load_lpips)}
    weights = {name: read(path) for name, (path, read) in weights.items() if path is not None}
    curves, batch_size = args.curves or "pixels", args.batch_size or BATCH_SIZE
    scorer = TokenizerScorer(networks, weights.get("inception"), weights.get("lpips"), batch_size, curves)
    size, channels = networks.tokenizer.image_size, networks.tokenizer.channels
    images = open_images(args.images, size, out, not args.ignore_orientation, directory, channels=channels)
    require_usable(images)
    computing = {"dtype": args.dtype or "float32", "precision": networks.tokenizer.precision, "curves": curves}
    about |= {"images": json.dumps(images.about)} | computing
    about |= {name: [*weights[name].sources.values()] if name in weights else None for name in ("inception", "lpips")}
    warnings = tuple(find_warnings(len(images), weights, computing["dtype"]))

    def run(folder) -> Evaluation:
        scores = compute(folder, images, scorer)
        if not scores:
            return Evaluation({}, {})
        structure = {name: getattr(networks.tokenizer, name) for name in ("sides", "vocab_size", "code_width", "ch")}
        tokenizer = {"directory": str(directory), "fingerprint": about["tokenizer"], "image_size": size, **structure}
        settings: dict[str, Any] = {"tokenizer": tokenizer | computing, "images": images.about}
        settings |= {"batch_size": scorer.batch_size} | common_settings(weights)
        return evaluation_of(scores, settings, structure, warnings)

    return Job(about, warnings, run)


def find_warnings(num_images: int, weights, dtype: str) -> list[str]:
    """Return why the scores will not compare with published ones, as far as it is known before computing."""
    from mvar_jax.evaluation.inception import POOL_WIDTH

    found = []
    if "inception" in weights and num_images <= POOL_WIDTH:
        found.append(
            f"{num_images} images are fewer than the {POOL_WIDTH + 1} that a covariance of {POOL_WIDTH} features "
            "needs: rFID is too large to compare with that of other numbers"
        )
    names = {"inception": "Inception", "lpips": "LPIPS"}
    for name, network in weights.items():
        if network.is_published is False:
            others = "compare only with scores by the same files"
            found.append(f"the {names[name]} weights are not the published files: {others}")
    if dtype != "float32":
        found.append(f"images are encoded and decoded in {dtype}, which gives other ids and pixels than float32")
    return found


def compute(folder, images, scorer) -> dict[str, Any]:
    """Compute this process's missing parts; return the scores of all in the first process, else {}."""
    from mvar_jax.evaluation.tokenizer_parts import PartFolder
    from mvar_jax.evaluation.tokenizer_report import write_curves
    from mvar_jax.processes import group
    from mvar_jax.progress import Progress
    from mvar_jax.stopping import StopFlag

    here, parts = group.current(), PartFolder(folder, images, scorer)
    if here.index == 0:
        print(*(f"{note}\n" for note in images.notes), sep="", end="", flush=True)
    own = range(here.index, parts.num_parts, here.count)
    missing = parts.find_missing(own)
    num_of = lambda numbers: sum(len(parts.rows(part)) for part in numbers)
    shown = Progress("evaluate", num_of(own), "image", done=num_of(own) - num_of(missing), is_shown=here.index == 0)
    with shown as progress, StopFlag(notice="stopping; the finished parts are kept") as stop:

        def on_image() -> None:
            progress.update()
            stop.raise_if_set()

        parts.fill(missing, on_image)
    here.wait_for_all("the parts")
    if here.index:
        return {}
    scores = parts.scores()
    write_curves(folder.parent, scores["by_scale"])
    return scores


def evaluation_of(scores: dict[str, Any], settings: dict[str, Any], structure: dict[str, Any], warnings):
    """Return the `Evaluation`, with the published figures if the tokenizer has VAR's structure."""
    from mvar_jax.evaluation.published import NUM_SAMPLES
    from mvar_jax.evaluation.reconstruction import NO_SSIM, note_exact
    from mvar_jax.evaluation.report import Evaluation
    from mvar_jax.evaluation.tokenizer_report import VAR_TOKENIZER, VAR_TOKENIZER_SCORES, table_of

    is_var, notes = structure == dict(VAR_TOKENIZER), []
    num, exact, bad = (scores["num_images"], scores["exact_images"], len(scores["skipped"]))
    notes.append(f"scores of {num} images against the same images, {settings['images']['transform']}")
    if is_var and num != NUM_SAMPLES:
        notes.append(f"the published rFID is of {NUM_SAMPLES} validation images of ImageNet")
    if bad:
        last = scores["skipped"][-1]
        notes.append(f"{bad} images cannot be used and are left out; the last is {last['name']}: {last['reason']}")
    if exact:
        notes.append(note_exact(exact))
    for name, title, option in (("rfid", "rFID", "--inception"), ("lpips", "LPIPS", "--lpips")):
        if scores[name] is None:
            notes.append(f"no {title}: give {option} FILE")
    if scores["ssim"] is None:
        notes.append(NO_SSIM)
    published = dict(VAR_TOKENIZER_SCORES) if is_var else {}
    details = table_of(scores["by_scale"])
    return Evaluation(scores, settings, published, "VAR" * is_var, warnings, tuple(notes), details)
