"""Encode and decode images: originals next to reconstructions, PSNR and SSIM of each, and the arrays.

Writes NNNNNN_NAME.png for each image, numbered in the order of the names; a grid of the first ones; the table
psnr.md; and reconstructions.npz, whose `arr_0` (uint8, NHWC) FID programs read. Images in sub-folders are
read, hidden files are not. Unusable images are skipped, counted and listed by name. If all are unusable, nothing is
written. Resumable: rerunning the command continues.
"""

import os
from pathlib import Path

from mvar_jax.cli.identity import options_of
from mvar_jax.cli.models import add_model_arguments, load_as_asked
from mvar_jax.cli.sampling import check_positive

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
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids int32 [N, L]")


def list_files(folder: Path, out: Path) -> list[str]:
    """Return the names of the files below a folder, relative to it, in order, without hidden ones and those of `out`.

    Folders that links lead to count once. Raises OSError if a folder cannot be read.
    """
    from mvar_jax.files.paths import is_store

    if is_store(folder):
        names = [name for name in folder.find() if not str(folder / name).startswith(f"{out}/")]  # type: ignore
    else:
        names, seen = [], {os.path.realpath(out)}
        for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            names += [os.path.relpath(os.path.join(parent, file), folder) for file in files]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split(os.sep)))


def _raise(error: OSError) -> None:
    raise error


def find_images(path: Path, out: Path) -> tuple[Path, list[str]]:
    """Return (folder, names of its images in order); a single file alone. Raises InputError if there are none."""
    from mvar_jax.data.decoding import SUFFIXES
    from mvar_jax.errors import InputError, shorten

    expected, reason, names = f"an image file or a folder of {', '.join(SUFFIXES)} files", "", []
    try:
        if path.is_dir():
            found = list_files(path, out)
            names = [name for name in found if name.lower().endswith(SUFFIXES)]
            if others := len(found) - len(names):
                other = next(name for name in found if not name.lower().endswith(SUFFIXES))
                print(f"{path}: {others} of {len(found)} files left out, no images by their names, such as {other}")
        elif path.exists():
            return path.parent, [path.name]
    except OSError as error:
        reason = f" ({error.filename}: {shorten(error)})"
    if not names:
        message = f"--images must be {expected}, got {str(path)!r}{reason}"
        raise InputError(message, field="images", given=str(path), expected=expected)
    return path, names


def load_pixels(path: Path, transform):
    """Return an image file as pixels of the model's size. Raises BadImage if it cannot be used."""
    from mvar_jax.data.decoding import BadImage
    from mvar_jax.errors import shorten
    from mvar_jax.files.paths import is_store

    try:
        if not (is_store(path) or path.is_file()):  # a pipe would never end
            raise BadImage("is missing or no file")
        return transform(path.read_bytes())
    except OSError as error:
        raise BadImage(f"cannot be read: {shorten(error)}") from None


def run(args) -> int:
    """Check the model and every image, then write the results."""
    from mvar_jax.errors import InputError
    from mvar_jax.files.paths import as_path

    check_positive(args, "batch_size")
    out, path = as_path(args.out, "out"), as_path(args.images, "images")
    folder, names = find_images(path, out)

    from mvar_jax.checkpoints.model_directory import fingerprint
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.evaluation.reconstruction import TABLE_FILE, Images, readable, write_reconstructions
    from mvar_jax.processes.holding import owned_folder

    model = load_as_asked(args)
    transform = PhotoTransform(model.tokenizer.image_size, flip=False)
    images = Images.check(names, lambda name: load_pixels(folder / name, transform))
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
        table = write_reconstructions(model, images, out, args.batch_size, args.save_tokens)
    print(table if len(images.names) <= MAX_SHOWN else table.splitlines()[-1])
    print("".join(f"bad: {line}\n" for line in bad[:MAX_SHOWN]), end="")
    if len(bad) > MAX_SHOWN:
        print(f"and {len(bad) - MAX_SHOWN} more: see {out / TABLE_FILE}")
    print(f"{out}: {len(images.names)} images" + (f", {len(bad)} skipped" if bad else ""))
    return 0
