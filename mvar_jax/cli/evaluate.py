"""Score samples as the published evaluator does: FID, sFID, inception score, precision and recall.

Scores the samples of a file or folder (--samples), draws samples of a model and scores them without writing images
(--checkpoint), or scores a tokenizer's reconstructions (--tokenizer and --images: rFID, PSNR, SSIM, LPIPS, codebook
usage and perplexity by scale, curves.csv and curves.png; in float32 unless --dtype says otherwise). Writes
evaluation.json and evaluation.txt, with every setting on which the scores depend. Resumable: rerunning the command
continues. Nothing is downloaded.
"""

import contextlib
import sys
from pathlib import Path

from mvar_jax.cli.machine import add_machine_arguments, print_machine, use_compilation_cache
from mvar_jax.cli.models import add_loading_arguments
from mvar_jax.cli.sampling import add_drawing_arguments, add_sampling_arguments
from mvar_jax.errors import InputError
from mvar_jax.evaluation.published import PRESETS

SUMMARY = "score samples, a model or a tokenizer: FID and others"

SAMPLES, CHECKPOINT, TOKENIZER, REFERENCE = "samples", "checkpoint", "tokenizer", "save_reference"
DOORS = (SAMPLES, CHECKPOINT, TOKENIZER)
_SCORING, _ALL = (SAMPLES, CHECKPOINT), (SAMPLES, CHECKPOINT, REFERENCE)
# option -> the doors that take it; every door takes the options that are not listed
DOORS_OF = {
    **dict.fromkeys(("reference", "save_reference", "inception_batch"), _ALL),
    **dict.fromkeys(("scores", "preset", "inception_dtype"), _SCORING),
    "image_size": (REFERENCE,),
    **dict.fromkeys(("which", "dtype", "precision", "tokenizer", "batch_size"), (CHECKPOINT, TOKENIZER)),
    **dict.fromkeys(("labels", "num_samples", "truncate_uint8", "weight_shards", "seed"), (CHECKPOINT,)),
    **dict.fromkeys(("cfg", "top_k", "top_p", "temperature", "smooth"), (CHECKPOINT,)),
    **dict.fromkeys(("refiner", "refine_scales", "switch"), (CHECKPOINT,)),
    **dict.fromkeys(("images", "lpips", "curves", "ignore_orientation"), (TOKENIZER,)),
}


def add_arguments(parser) -> None:
    """Add the command's arguments; an argument of some doors only defaults to None."""
    doors = parser.add_mutually_exclusive_group()
    doors.add_argument(
        "--samples",
        metavar="PATH",
        help="score an .npz file of images (arr_0 uint8 [N, Y, X, 3]), a folder of PNGs or one of `mvar sample`",
    )
    doors.add_argument(
        "--checkpoint", metavar="DIR", help="draw samples of a model directory or training workdir and score them"
    )
    parser.add_argument(
        "--out", default="evaluation", metavar="DIR", help="folder of the results (default evaluation)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse to compute scores that would carry a warning")
    _add_scoring(parser.add_argument_group("scores"))
    _add_models(parser.add_argument_group("models"))
    _add_drawing(parser.add_argument_group("samples of --checkpoint, as `mvar sample` draws them"))
    _add_reconstructions(parser.add_argument_group("reconstructions of --tokenizer"))
    add_machine_arguments(parser)
    parser.set_defaults(**dict.fromkeys(DOORS_OF))


def _add_scoring(parser) -> None:
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="what to compare with: an .npz file in the published form or of images, a folder of images, or "
        "KIND:SPLIT[:WHERE], a split of a data set as --images takes it",
    )
    parser.add_argument(
        "--save_reference",
        metavar="FILE",
        help="write the reference that is computed, in the published form, to a new .npz file; alone: only that",
    )
    parser.add_argument(
        "--image_size", type=int, metavar="N", help="side of the images of --save_reference without samples"
    )
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="what `mvar convert --inception` wrote, or the public download itself",
    )
    parser.add_argument(
        "--scores", metavar="NAME,...", help="of fid, sfid, inception_score, precision, recall (default: all)"
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="show the published scores of this model beside; with --checkpoint also its published sampling options",
    )
    parser.add_argument(
        "--inception_batch", type=int, metavar="B", help="images of a device at a time (default 256, on a CPU 4)"
    )
    parser.add_argument(
        "--inception_dtype",
        choices=("float32", "bfloat16"),
        help="of the samples' features (default float32); bfloat16 is faster on an accelerator and gives other "
        "scores; the difference in FID is measured on the first 1,024 samples and stated",
    )


def _add_models(parser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="score the reconstructions of this model directory or training workdir; with --checkpoint: its "
        "tokenizer, as in `mvar sample`",
    )
    add_loading_arguments(parser)
    parser.add_argument(
        "--batch_size", type=int, metavar="B", help="samples per batch (default 64), images of a device (default 16)"
    )


def _add_drawing(parser) -> None:
    parser.add_argument(
        "--num_samples",
        type=int,
        metavar="N",
        help="number of samples, of all labels in turn, or of labels spread evenly if they are fewer (default 50000)",
    )
    parser.add_argument("--labels", metavar="L,L", help="as in `mvar sample` (default: all classes)")
    add_sampling_arguments(parser)
    add_drawing_arguments(parser)


def _add_reconstructions(parser) -> None:
    parser.add_argument(
        "--images",
        metavar="SOURCE",
        help="originals for --tokenizer, cut to squares as in training: a folder, FILE.npz with arr_0, config:val "
        "(the held-out images of the workdir's config), folder:val:PATH, tars:val:PATH, tfds:val:NAME or digits:val",
    )
    parser.add_argument(
        "--lpips", metavar="FILE", help="what `mvar convert --lpips` wrote; without it there is no LPIPS"
    )
    parser.add_argument(
        "--curves",
        choices=("off", "pixels", "all"),
        help="scores after each number of scales S: PSNR, SSIM and LPIPS (pixels, default), rFID too (all); each "
        "image is decoded S times, with off once",
    )
    parser.add_argument(
        "--ignore_orientation",
        action="store_true",
        help="leave photographs as the camera stored them, as the published programs do",
    )


def run(args) -> int:
    """Run the command; everything is checked before the first file is written."""
    from mvar_jax.files.directories import remove_tree
    from mvar_jax.files.paths import as_path

    check_door(args)
    out = as_path(args.out, "out")
    use_compilation_cache(args.compilation_cache)

    from mvar_jax.evaluation.report import RESULT_FILE, TEXT_FILE, write_evaluation
    from mvar_jax.processes import group
    from mvar_jax.processes.holding import UNFINISHED, owned_folder

    here = group.current()
    if here.count > 1:
        print_machine()
    saves_to = None if args.save_reference is None else as_path(args.save_reference, REFERENCE)
    if saves_to is not None:
        check_saves_to(saves_to, out)
    with contextlib.ExitStack() as stack:
        job = prepare(args, stack)
        if job.warnings and args.strict:
            message = f"--strict refuses scores that do not compare with others: {'; '.join(job.warnings)}"
            raise InputError(message, field="strict", given=job.warnings[0], expected="no warning")
        for warning in job.warnings if here.index == 0 else ():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        stack.enter_context(owned_folder("out", out, "evaluate", dict(job.identity)))
        is_new = not (out / RESULT_FILE).exists()
        is_saved = saves_to is None or not is_new and saves_to.exists()
        here.wait_for_all("the look at the results")  # no process writes before all have looked
        evaluation = None if is_saved and not is_new else job.run(out / UNFINISHED)
        if here.index == 0:
            text = write_evaluation(out, evaluation) if is_new else (out / TEXT_FILE).read_text(encoding="utf-8")
            remove_tree(out / UNFINISHED)
            print(f"{text}\n{out / RESULT_FILE}: {'written' if is_new else 'already there'}")
            if saves_to is not None:
                print(f"{saves_to}: {'already there' if is_saved else 'written'}")
        here.wait_for_all("the results")
    return 0


def check_door(args) -> None:
    """Raise InputError if nothing is to be scored, or for an option of another door."""
    door = next((name for name in (*DOORS, REFERENCE) if getattr(args, name) is not None), None)
    if door is None:
        words = " or ".join(f"--{name}" for name in (*DOORS, REFERENCE))
        raise InputError(f"give {words}", field=SAMPLES, given=None, expected=words)
    for name, doors in DOORS_OF.items():
        if getattr(args, name) is not None and door not in doors:
            expected = "only with " + " or ".join(f"--{name}" for name in doors)
            raise InputError(f"--{name} cannot be combined with --{door}", field=name, expected=expected)


def check_saves_to(path: Path, out: Path) -> None:
    """Raise InputError unless a file is new, or of the evaluation in `out`, and ends in .npz."""
    from mvar_jax.evaluation.network_files import OWN_SUFFIX
    from mvar_jax.evaluation.report import RESULT_FILE
    from mvar_jax.evaluation.scoring import SAVING_FILE
    from mvar_jax.processes.holding import UNFINISHED

    expected = f"a new file that ends in {OWN_SUFFIX}"
    if path.suffix != OWN_SUFFIX:
        message = f"--save_reference must be {expected}, got {path}"
        raise InputError(message, field=REFERENCE, given=str(path), expected=expected)
    is_own = (out / RESULT_FILE).exists() or (out / UNFINISHED / SAVING_FILE).exists()
    if path.exists() and not is_own:
        message = f"--save_reference must be {expected}, got {path}, which exists"
        raise InputError(message, field=REFERENCE, given=str(path), expected=expected)


def prepare(args, stack: contextlib.ExitStack):
    """Return the `Job` of a door; its open files close with the stack."""
    from mvar_jax.cli import evaluate_samples, evaluate_tokenizer

    if args.checkpoint is None and args.tokenizer is not None:
        return evaluate_tokenizer.prepare(args)
    return evaluate_samples.prepare(args, stack)
