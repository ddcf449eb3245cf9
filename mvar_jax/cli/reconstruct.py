"""Encode and decode images: originals next to reconstructions, PSNR and SSIM of each, and the tokens."""

from pathlib import Path

from mvar_jax.cli.identity import options_of

SUMMARY = "encode and decode images, side by side"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser) -> None:
    """--checkpoint DIR --images PATH --out DIR."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--images", required=True, metavar="PATH", help="an image file or a folder of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; one run's alone")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="images at a time (default 16)")
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids int32 [N, L]")


def find_images(path: Path) -> list[Path]:
    """Return the file itself, or a folder's images by name. Raises InputError if there are none."""
    from mvar_jax.errors import InputError

    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        expected = f"an image file or a folder of {', '.join(SUFFIXES)} files"
        message = f"--images must be {expected}, got {str(path)!r}"
        raise InputError(message, field="images", given=str(path), expected=expected)
    return files


def run(args) -> int:
    """Check the model and every image, then write the results."""
    from mvar_jax.errors import InputError
    from mvar_jax.files.paths import as_path

    out = as_path(args.out, "out")
    files = find_images(as_path(args.images, "images"))
    if args.batch_size < 1:
        message = f"--batch_size must be 1 or more, got {args.batch_size}"
        raise InputError(message, field="batch_size", given=args.batch_size, expected="1 or more")

    from mvar_jax.api import load
    from mvar_jax.data.decoding import read_image
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.evaluation.reconstruction import write_reconstructions
    from mvar_jax.processes.holding import owned_folder

    model = load(args.checkpoint)
    transform = PhotoTransform(model.tokenizer.image_size, flip=False)
    for file in files:  # so that nothing is written if one cannot be read
        read_image(file)
    load_one = lambda file: transform(read_image(file))
    with owned_folder("out", out, "reconstruct", options_of(args, "batch_size")):
        table = write_reconstructions(model, files, load_one, out, args.batch_size, args.save_tokens)
    print(table)
    return 0
