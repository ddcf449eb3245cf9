"""Edit part of an image: in-painting or another class by --mask, out-painting by --expand.

The image is cropped to the model's square. Pixels outside the mask stay unchanged; sampled ones fade in over --border
pixels inside it. Writes grid.png (before, mask, after; one row per label) and one PNG per result.
"""

import dataclasses
from pathlib import Path

from mvar_jax.cli.identity import options_of
from mvar_jax.cli.sampling import add_sampling_arguments, check_positive, sampling_options

SUMMARY = "edit part of an image"


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--image", required=True, metavar="FILE", help="the image to edit")
    parser.add_argument("--mask", metavar="FILE", help="mask of the image's size: white is replaced, black is kept")
    parser.add_argument(
        "--expand", type=float, metavar="F", help="instead of a mask: shrink the image F times and paint around it"
    )
    parser.add_argument("--label", required=True, metavar="L", help="class by number or name; several with commas")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="results of each label (default 4)")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--border", type=int, metavar="PX", help="pixels of the fade (default: 1/32 of the side)")
    parser.add_argument(
        "--softness",
        type=float,
        metavar="S",
        help="0 to 1: how far tokens at the mask's border are mixed",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; one run's alone")


def read_square(path: str, field: str, side: int):
    """Return (uint8 image cropped to the model's square, height and width of the file).

    Raises InputError if the file is not an image, or is too long and thin to crop.
    """
    from mvar_jax.data.decoding import BadImage, read_image
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.errors import InputError

    image_YX3 = read_image(path, field)
    try:
        return PhotoTransform(side, flip=False)(image_YX3), image_YX3.shape[:2]
    except BadImage as error:
        message = f"--{field}={path} cannot be used: {error}; choose an image nearer to a square"
        raise InputError(message, field=field, given=path, expected="an image nearer to a square") from None


def read_image_and_mask(args, side: int):
    """Return (uint8 image, bool mask `[Y, X]`). Raises InputError if --mask and --image differ in size."""
    from mvar_jax.errors import InputError
    from mvar_jax.sampling.editing import shrink_onto_canvas

    image_YX3, size = read_square(args.image, "image", side)
    if args.expand is not None:
        return shrink_onto_canvas(image_YX3, args.expand)
    mask_YX3, mask_size = read_square(args.mask, "mask", side)
    if mask_size != size:
        given, expected = (f"{width} x {height} pixels" for height, width in (mask_size, size))
        message = f"--mask must have the image's size, {expected}, got {given}"
        raise InputError(message, field="mask", given=given, expected=expected)
    return image_YX3, mask_YX3.mean(axis=-1) > 127.5


def write_edits(before_YX3, mask_YX, after_BYX3, num: int, out: Path) -> None:
    """Write NNNNNN.png, and grid.png with a row of before, mask and `num` results for each label."""
    import numpy as np

    from mvar_jax.files.images import min_zoom, save_png, tile_grid

    mask_YX3 = np.repeat(mask_YX[..., None].astype(np.uint8) * 255, 3, axis=-1)
    cells = []
    for number, after_YX3 in enumerate(after_BYX3):
        save_png(out / f"{number:06d}.png", after_YX3)
        cells += [after_YX3] if number % num else [before_YX3, mask_YX3, after_YX3]
    save_png(out / "grid.png", tile_grid(np.stack(cells), num + 2, zoom=min_zoom(before_YX3.shape[0])))


def run(args) -> int:
    """Run the command; everything is checked before the first file is written."""
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.cli.machine import AUTO, use_compilation_cache
    from mvar_jax.errors import InputError
    from mvar_jax.files.paths import as_path
    from mvar_jax.values import as_seed

    options = sampling_options(args)
    if (args.mask is None) == (args.expand is None):
        given = "neither" if args.mask is None else "both"
        message = f"exactly one of --mask and --expand is needed, got {given}"
        raise InputError(message, field="mask", given=args.mask, expected="one of --mask and --expand")
    check_positive(args, "num")
    as_seed(args.seed)
    checkpoint, out = as_path(args.checkpoint, "checkpoint"), as_path(args.out, "out")
    labels = class_names_of(checkpoint).numbers_of(args.label)

    from mvar_jax.api import load
    from mvar_jax.files.images import to_uint8
    from mvar_jax.ops.pixels import from_levels
    from mvar_jax.processes.holding import owned_folder
    from mvar_jax.sampling.editing import SOFTNESS, check_border, check_mask

    use_compilation_cache(AUTO)
    model = load(checkpoint)
    labels = model.labels(labels)
    side = model.tokenizer.image_size
    softness = SOFTNESS if args.softness is None else args.softness
    image_YX3, mask_YX = read_image_and_mask(args, side)
    check_border(args.border, softness, side)
    check_mask(mask_YX, side)
    with owned_folder("out", out, "edit", options_of(args)):
        after, _ = model.edit(
            from_levels(image_YX3[None]),
            mask_YX,
            labels.repeat(args.num),
            seed=args.seed,
            border_px=args.border,
            softness=softness,
            **dataclasses.asdict(options),
        )
        write_edits(image_YX3, mask_YX, to_uint8(after), args.num, out)
    return 0
