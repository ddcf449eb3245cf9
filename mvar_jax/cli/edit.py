"""Edit part of an image: in-painting or another class by --mask, out-painting by --expand.

White in the mask is sampled as the class and black is kept, with a threshold at half; values 0 and 1 are black and
white too. If a mask has colours, the coloured pixels are sampled, whatever is behind them. If a mask has transparent
pixels, the opaque paint is sampled, or its white parts if the paint is black and white. If the opaque part has more
than 16 colours, the mask is an image with a hole, and the hole is sampled. --invert swaps what is sampled and kept.

The largest square around the mask is resized to the model's size, and the result back into an image of the full size.
Pixels outside the mask stay unchanged; sampled ones fade in over --border pixels inside it. With --expand the image
is cropped to the model's square. Writes grid.png (before, mask, after; one row per label) and one PNG per result.
"""

from collections.abc import Iterator
from pathlib import Path

from mvar_jax.cli.identity import options_of
from mvar_jax.cli.models import add_model_arguments, add_tokenizer_argument, load_as_asked
from mvar_jax.cli.sampling import add_sampling_arguments, check_positive, sampling_options

SUMMARY = "edit part of an image"


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    parser.add_argument("--image", required=True, metavar="FILE", help="the image to edit")
    parser.add_argument("--mask", metavar="FILE", help="mask of the image's size: white is sampled, black is kept")
    parser.add_argument("--invert", action="store_true", help="sample what the mask keeps, and keep what it samples")
    parser.add_argument(
        "--expand", type=float, metavar="F", help="instead of a mask: shrink the image F times and paint around it"
    )
    parser.add_argument("--label", required=True, metavar="L", help="classes, as --labels of sample")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="results of each label (default 4)")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--border", type=int, metavar="PX", help="pixels of the fade (default: 1/32 of the square)")
    parser.add_argument(
        "--softness",
        type=float,
        metavar="S",
        help="0 to 1: how far tokens at the mask's border are mixed (default 0.5)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; one run's alone")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="results per batch (default 16)")


def read_square(args, side: int, channels: int):
    """Return the `Square` to edit, of images of this side and these channels.

    Raises InputError if an image cannot be read, or mask and image do not fit.
    """
    from mvar_jax.data.decoding import BadImage, read_image, read_values
    from mvar_jax.data.transforms import PhotoTransform
    from mvar_jax.errors import InputError
    from mvar_jax.ops.pixels import from_levels
    from mvar_jax.sampling.editing import shrink_onto_canvas
    from mvar_jax.sampling.masks import check_mask
    from mvar_jax.sampling.squares import Square

    image_YX3 = read_image(args.image, "image", channels)
    if args.expand is not None:
        try:
            transform = PhotoTransform(side, flip=False, channels=channels)
            image_YX3, mask = shrink_onto_canvas(transform(image_YX3), args.expand)
        except BadImage as error:
            message = f"--image={args.image} cannot be used: {error}; choose an image nearer to a square"
            raise InputError(message, field="image", given=args.image, expected="nearer to a square") from None
    else:
        mask = read_values(args.mask, "mask")
    if mask.shape[:2] != image_YX3.shape[:2]:
        given, expected = (f"{width} x {height} pixels" for height, width, *_ in (mask.shape, image_YX3.shape))
        message = f"--mask must have the image's size, {expected}, got {given}"
        raise InputError(message, field="mask", given=given, expected=expected)
    (mask_YX,) = check_mask(mask, *image_YX3.shape[:2], args.invert)
    return Square.around(from_levels(image_YX3), mask_YX, side)


def check_choice(args) -> None:
    """Raise InputError unless exactly one of --mask and --expand is given, and --invert only with --mask."""
    from mvar_jax.errors import InputError

    if (args.mask is None) == (args.expand is None):
        given = "neither" if args.mask is None else "both"
        message = f"exactly one of --mask and --expand is needed, got {given}"
        raise InputError(message, field="mask", given=args.mask, expected="one of --mask and --expand")
    if args.invert and args.mask is None:
        message = "--invert needs --mask, got --expand; leave --invert out"
        raise InputError(message, field="invert", given=True, expected="--mask")


def draw_results(model, square, labels_N, options, args) -> Iterator:
    """Yield the results `[Y, X, 3] float32` of the model's size, in batches of one shape; N labels, one for each."""
    import numpy as np

    from mvar_jax.progress import Progress

    N, size = len(labels_N), min(args.batch_size, len(labels_N))
    with Progress("edit", N, "image") as progress:
        for begin in range(0, N, size):
            rows = np.minimum(np.arange(begin, begin + size), N - 1)
            drawn, _ = model.edit_squares([square], labels_N[rows], args.seed, options, args.softness, rows)
            yield from drawn[: N - begin]
            progress.update(min(size, N - begin))


def write_edits(square, results: Iterator, num: int, border_px: int | None, out: Path) -> None:
    """Write NNNNNN.png of each result of the model, and grid.png: before, mask and `num` results for each label."""
    import numpy as np

    from mvar_jax.files.images import GRID_IMAGES, min_zoom, save_png, tile_grid, to_uint8

    columns = min(num + 2, GRID_IMAGES)
    before_YX3 = to_uint8(square.view(square.image_YX3))
    mask_YX3 = np.repeat(square.known()[1][..., None].astype(np.uint8) * 255, before_YX3.shape[2], axis=-1)
    mask_YX3[..., 3:] = 255  # alpha
    cells: list[np.ndarray] = []
    for number, result_YX3 in enumerate(results):
        after_YX3 = square.paste(result_YX3, border_px)
        save_png(out / f"{number:06d}.png", to_uint8(after_YX3))
        row, column = divmod(number, num)
        if column < columns - 2 and row < GRID_IMAGES // columns:
            cells += [before_YX3, mask_YX3] if column == 0 else []
            cells.append(to_uint8(square.view(after_YX3)))
    save_png(out / "grid.png", tile_grid(np.stack(cells), columns, zoom=min_zoom(len(before_YX3))))


def run(args) -> int:
    """Run the command; everything is checked before the first file is written."""
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.cli.machine import AUTO, use_compilation_cache
    from mvar_jax.files.paths import as_path
    from mvar_jax.values import as_num_each, as_seed

    options = sampling_options(args)
    check_choice(args)
    check_positive(args, "num", "batch_size")
    as_seed(args.seed)
    out = as_path(args.out, "out")
    labels = class_names_of(as_path(args.checkpoint, "checkpoint")).numbers_of(args.label)

    from mvar_jax.processes.holding import owned_folder
    from mvar_jax.sampling.editing import SOFTNESS, check_border

    args.softness = SOFTNESS if args.softness is None else args.softness
    use_compilation_cache(AUTO)
    model = load_as_asked(args)
    labels = model.labels(labels)
    as_num_each(args.num, len(labels))
    options.check_scales(len(model.tokenizer.sides))
    square = read_square(args, model.tokenizer.image_size, model.tokenizer.channels)
    check_border(args.border, args.softness, square.side)
    identity = options_of(args, "batch_size")
    if args.refiner == "on":
        identity["refiner"] = None  # as in folders that were written before there were refiners
    with owned_folder("out", out, "edit", identity):
        results = draw_results(model, square, labels.repeat(args.num), options, args)
        write_edits(square, results, args.num, args.border, out)
    print(f"{out}: {len(labels) * args.num} results, {square.mask_YX.mean():.1%} of the image sampled")
    return 0
