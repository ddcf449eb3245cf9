"""Draws part of a picture anew: in-painting and change of class by a mask, out-painting by --expand.

The picture is cut to the model's square. Pixels outside the mask stay as they are; drawn ones fade in over --border
pixels inside it. Writes grid.png (before, mask, after; a row for each label) and one PNG of each result.
"""

from pathlib import Path

from mvar_jax.cli.sampling import add_sampling_arguments

SUMMARY = "draw part of a picture anew, as a class"


def add_arguments(parser) -> None:
    """See --help."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument("--mask", metavar="FILE", help="of the picture's size, white where to draw")
    parser.add_argument(
        "--expand", type=float, metavar="F", help="instead of a mask: shrink the picture F times and draw around it"
    )
    parser.add_argument("--label", required=True, metavar="L", help="class by number or name; several with commas")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="results of each label (default 4)")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--border", type=int, metavar="PX", help="pixels of the fade (default: 1/32 of the side)")
    parser.add_argument(
        "--softness", type=float, metavar="S", help="0 to 1: how far the tokens of the mask's border are mixed"
    )
    parser.add_argument("--out", required=True, metavar="DIR")


def read_square(path: str, field: str, side: int):
    """(uint8 image cut to the model's square, height and width of the file). Raises InputError for none."""
    from mvar_jax.data.decoding import BadImage, read_image
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.errors import InputError

    image_YX3 = read_image(path, field)
    try:
        return PhotoTransform(side, flip=False)(image_YX3), image_YX3.shape[:2]
    except BadImage as error:
        raise InputError(field, path, f"a picture of another shape ({error})") from None


def read_image_and_mask(args, side: int):
    """(uint8 image, bool mask [Y, X]) as the options say. Raises InputError unless they go together."""
    from mvar_jax.errors import InputError
    from mvar_jax.sampling.editing import shrink_onto_canvas

    image_YX3, size = read_square(args.image, "image", side)
    if args.expand is not None:
        return shrink_onto_canvas(image_YX3, args.expand)
    mask_YX3, mask_size = read_square(args.mask, "mask", side)
    if mask_size != size:
        sizes = [f"{width} x {height} pixels" for height, width in (mask_size, size)]
        raise InputError("mask", sizes[0], f"{sizes[1]}, as the image has")
    return image_YX3, mask_YX3.mean(axis=-1) > 127.5


def write_edits(before_YX3, mask_YX, after_BYX3, num: int, out: Path) -> None:
    """NNNNNN.png, and grid.png with a row of before, mask and `num` results for each label."""
    import numpy as np

    from mvar_jax.files.images import save_png, tile_grid

    mask_YX3 = np.repeat(mask_YX[..., None].astype(np.uint8) * 255, 3, axis=-1)
    cells = []
    for number, after_YX3 in enumerate(after_BYX3):
        save_png(out / f"{number:06d}.png", after_YX3)
        cells += [after_YX3] if number % num else [before_YX3, mask_YX3, after_YX3]
    save_png(out / "grid.png", tile_grid(np.stack(cells), num + 2, zoom=max(1, 96 // before_YX3.shape[0])))


def run(args) -> int:
    """Checks everything before the first file is written."""
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.cli.labels import parse_labels
    from mvar_jax.cli.machine import AUTO, use_compilation_cache
    from mvar_jax.errors import InputError
    from mvar_jax.ops.sampling import check_sampling_options

    check_sampling_options(args.cfg, args.top_k, args.top_p, args.temperature)
    if (args.mask is None) == (args.expand is None):
        raise InputError("mask", args.mask, f"one of --mask and --expand, which is {args.expand}")
    if args.num < 1:
        raise InputError("num", args.num, "1 or more")
    if not 0 <= args.seed < 2**32:
        raise InputError("seed", args.seed, "an integer from 0 to 2**32 - 1")
    labels = parse_labels(args.label, class_names_of(Path(args.checkpoint)))

    from mvar_jax.api import check_labels, load
    from mvar_jax.files.directories import make_directory
    from mvar_jax.files.images import to_uint8
    from mvar_jax.ops.pixels import from_levels
    from mvar_jax.sampling.editing import SOFTNESS, check_border, check_mask

    use_compilation_cache(AUTO)
    model = load(args.checkpoint)
    check_labels(labels, model.num_classes)
    side = model.tokenizer.image_size
    softness = SOFTNESS if args.softness is None else args.softness
    image_YX3, mask_YX = read_image_and_mask(args, side)
    check_border(args.border, softness, side)
    check_mask(mask_YX, side)
    make_directory(Path(args.out))
    after, _ = model.edit(
        from_levels(image_YX3[None]),
        mask_YX,
        labels.repeat(args.num),
        seed=args.seed,
        cfg=args.cfg,
        top_k=args.top_k,
        top_p=args.top_p,
        smooth=args.smooth,
        border_px=args.border,
        softness=softness,
        temperature=args.temperature,
    )
    write_edits(image_YX3, mask_YX, to_uint8(after), args.num, Path(args.out))
    return 0
