"""Encodes and decodes images: originals beside reconstructions, PSNR and SSIM of each, and the tokens."""

from pathlib import Path

SUMMARY = "encode and decode images, side by side"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser) -> None:
    """--checkpoint DIR --images PATH --out DIR."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--images", required=True, metavar="PATH", help="an image file or a folder of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="images at a time (default 16)")
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids int32 [N, L]")


def find_images(path: Path) -> list[Path]:
    """The file itself, or a folder's images by name. Raises InputError where there is none."""
    from mvar_jax.errors import InputError

    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError("images", str(path), f"an image file or a folder of {', '.join(SUFFIXES)} files")
    return files


def run(args) -> int:
    """Checks the model and every image before the first file is written."""
    from mvar_jax.errors import InputError

    files = find_images(Path(args.images))
    if args.batch_size < 1:
        raise InputError("batch_size", args.batch_size, "1 or more")

    from mvar_jax.api import load
    from mvar_jax.data.decoding import read_image
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.evaluation.reconstruction import write_reconstructions
    from mvar_jax.files.directories import make_directory

    model = load(args.checkpoint)
    transform = PhotoTransform(model.tokenizer.image_size, flip=False)
    for file in files:
        read_image(file)
    make_directory(Path(args.out))
    load_one = lambda file: transform(read_image(file))
    print(write_reconstructions(model, files, load_one, Path(args.out), args.batch_size, args.save_tokens))
    return 0
