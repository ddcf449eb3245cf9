"""Draws images of given classes: grid.png, one PNG an image, and samples.npz (the ADM evaluator's form)."""

from pathlib import Path

SUMMARY = "draw images from a model"


def add_arguments(parser) -> None:
    """See --help."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument(
        "--labels", required=True, metavar="L,L", help="classes, as 207,360, or a range 0-9, or 'golden retriever'"
    )
    parser.add_argument("--num", type=int, default=8, metavar="N", help="images of each label (default 8)")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance (default 1.5)")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest codes; 0: all (default)")
    parser.add_argument(
        "--top_p", type=float, default=0.0, help="keep the likeliest codes of mass p; 0: all (default)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="images at a time (default 64)")
    parser.add_argument(
        "--smooth", action="store_true", help="Gumbel-average mode: smoother pictures, for looking at"
    )
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids, labels, f_hat")
    parser.add_argument("--truncate_uint8", action="store_true", help="round pixels down, as the published program")


def run(args) -> int:
    """Checks everything before the first file is written."""
    from mvar_jax.cli.labels import parse_labels
    from mvar_jax.data.class_names import class_names_of
    from mvar_jax.errors import InputError
    from mvar_jax.ops.sampling import check_sampling_options

    check_sampling_options(args.cfg, args.top_k, args.top_p)
    labels = parse_labels(args.labels, class_names_of(Path(args.checkpoint)))
    for name in ("num", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(name, getattr(args, name), "1 or more")
    if not 0 <= args.seed < 2**32:
        raise InputError("seed", args.seed, "an integer from 0 to 2**32 - 1")

    from mvar_jax.evaluation.draw import draw_all, make_directory
    from mvar_jax.model import check_labels, load
    from mvar_jax.sampling.sampler import SampleOptions

    model = load(args.checkpoint)
    check_labels(labels, model.num_classes)
    out = Path(args.out)
    make_directory(out)
    options = SampleOptions(args.cfg, args.top_k, args.top_p, args.smooth)
    draw_all(
        model,
        labels.repeat(args.num),
        options,
        out,
        seed=args.seed,
        batch_size=args.batch_size,
        columns=args.num,
        saves_tokens=args.save_tokens,
        truncates=args.truncate_uint8,
    )
    return 0
