"""Encode and decode images: originals next to reconstructions, PSNR and SSIM of each, and the arrays.

Writes NNNNNN_NAME.png for each image, numbered in the order of the names; a grid of the first ones; the table
psnr.md; and reconstructions.npz, whose `arr_0` (uint8, NHWC) FID programs read. Images in sub-folders are
read, hidden files are not. Unusable images are skipped, counted and listed by name. If all are unusable, nothing is
written. Resumable: rerunning the command continues. `evaluate --tokenizer` computes the scores of any number of
images: rFID, LPIPS and codebook usage too.
"""

from typing import Any

from mvar_jax.cli.identity import options_of
from mvar_jax.cli.models import add_model_arguments, load_as_asked
from mvar_jax.cli.sampling import check_positive
from mvar_jax.errors import InputError

SUMMARY = "encode and decode images, side by side"
MAX_SHOWN = 20  # names and scores on the screen


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--images", required=True, metavar="PATH", help="an image file, or a folder of them and of sub-folders"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; one run's alone")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="images at a time (default 16)")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="height and width to which images are cut, such as 256x384: multiples of the tokenizer's reduction; "
        "larger ones take more scales (default: the tokenizer's own square)",
    )
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids int32 [N, L]")


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of a text such as 256x384. Raises InputError for another text."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        expected = "HEIGHTxWIDTH in pixels, such as 256x384"
        raise InputError(f"--size must be {expected}, got {text!r}", field="size", given=text, expected=expected)
    return int(height), int(width)


def run(args) -> int:
    """Check the model and every image, then write the results."""
    from mvar_jax.data.image_files import find_images, read_file
    from mvar_jax.files.paths import as_path

    check_positive(args, "batch_size")
    out, path = as_path(args.out, "out"), as_path(args.images, "images")
    folder, names, notes = find_images(path, out)
    print(*(f"{note}\n" for note in notes), sep="", end="")

    from mvar_jax.checkpoints.model_directory import fingerprint
    from mvar_jax.data.transforms import CoverTransform, PhotoTransform
    from mvar_jax.evaluation.reconstruction import TABLE_FILE, Images, readable, write_reconstructions
    from mvar_jax.processes.holding import owned_folder

    model = load_as_asked(args)
    channels = model.tokenizer.channels
    transform: Any = PhotoTransform(model.tokenizer.image_size, flip=False, channels=channels)
    if args.size is not None:
        model = model.for_images(*parse_size(args.size))
        transform = CoverTransform(*model.tokenizer.image_shape, channels=channels)
    images = Images.check(names, lambda name: transform(read_file(folder / name)))
    bad = [f"{readable(name)}: {reason}" for name, reason in images.bad.items()]
    if not images.names:
        expected = "an image that can be used"
        message = f"--images must hold {expected}, got {len(bad)} bad in {args.images!r}; the last is {bad[-1]}"
        raise InputError(message, field="images", given=args.images, expected=expected)
    # what they are, not where they lie: finished batches may be those of an earlier start
    weights = f"weights {fingerprint(model.tokenizer, model.tokenizer_params)[:16]}"
    files = f"{len(images.names)} images, names and pixels {images.digest}"
    identity = options_of(args, "batch_size", "which") | {"checkpoint": weights, "images": files}
    with owned_folder("out", out, "reconstruct", identity):
        table, notes = write_reconstructions(model, images, out, args.batch_size, args.save_tokens)
    print(table if len(images.names) <= MAX_SHOWN else table.splitlines()[-1])
    print("".join(f"{note}\n" for note in notes), end="")
    print("".join(f"bad: {line}\n" for line in bad[:MAX_SHOWN]), end="")
    if len(bad) > MAX_SHOWN:
        print(f"and {len(bad) - MAX_SHOWN} more: see {out / TABLE_FILE}")
    print(f"{out}: {len(images.names)} images" + (f", {len(bad)} skipped" if bad else ""))
    return 0
