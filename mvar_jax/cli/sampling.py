"""The sampling options that all commands share."""

from argparse import ArgumentTypeError

from mvar_jax.errors import InputError


def add_sampling_arguments(parser) -> None:
    """Add --cfg, --top_k, --top_p, --temperature, --smooth, --refiner, --refine_scales and --switch."""
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance (default 1.5)")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k most likely codes; 0: all (default)")
    parser.add_argument(
        "--top_p", type=float, default=0.0, help="keep the most likely codes of mass p; 0: all (default)"
    )
    parser.add_argument(
        "--temperature",
        type=numbers_of,
        default=1.0,
        metavar="T[,T]",
        help="above 1: more varied samples, below 1: more likely ones (default 1); or a number for each scale, "
        'coarse to fine, as "1.2,1.2,1,1,1"',
    )
    parser.add_argument("--smooth", action="store_true", help="Gumbel-average mode: smoother images, for display")
    add_refiner_arguments(parser)
    add_switch_argument(parser)


def numbers_of(text: str) -> float | tuple[float, ...]:
    """Return one number or several, separated by commas, as argparse's types do."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f'must be a number, or numbers such as "1.2,1.2,1,1,1", got {text!r}') from None
    return numbers if len(numbers) > 1 else numbers[0]


def add_refiner_arguments(parser) -> None:
    """Add --refiner and --refine_scales."""
    parser.add_argument(
        "--refiner",
        choices=("on", "off"),
        default="on",
        help="on: draw with the refiner that the checkpoint holds, if any (default); off: without it",
    )
    parser.add_argument(
        "--refine_scales",
        metavar="N,N",
        help='scales to refine by number from 0 or range, as "0-3,5" (default: all that it was trained for)',
    )


def add_switch_argument(parser) -> None:
    """Add --switch."""
    parser.add_argument(
        "--switch",
        metavar="S:DIR",
        help="draw the first S scales with the model of --checkpoint and the rest with that of DIR, which shares the "
        'tokenizer, as "8:models/mvar-d16"',
    )


MAX_SCALE = 1000  # of --refine_scales; the model's own number is checked later


def refined_scales(args) -> tuple[int, ...] | None:
    """Return the numbers of --refine_scales, None if it is not given. Raises InputError unless they are numbers."""
    return None if args.refine_scales is None else scales_of(args.refine_scales)


def scales_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a value of --refine_scales. Raises InputError unless they are numbers or ranges."""
    try:
        parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
        ranges = [(part[0], part[-1]) for part in parts if len(part) <= 2]
        if len(ranges) < len(parts) or any(not first <= last <= MAX_SCALE for first, last in ranges):
            raise ValueError
        return tuple(scale for first, last in ranges for scale in range(first, last + 1))
    except ValueError:
        expected = 'numbers or ranges of scales, such as "0-3,5"'
        message = f"--refine_scales must be {expected}, got {text!r}"
        raise InputError(message, field="refine_scales", given=text, expected=expected) from None


def add_drawing_arguments(parser) -> None:
    """Add --seed, --truncate_uint8 and --weight_shards, for the commands that draw many samples."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--truncate_uint8", action="store_true", help="round pixels down, as the published code")
    parser.add_argument(
        "--weight_shards",
        type=int,
        default=1,
        metavar="N",
        help="shard the transformer's weights over N of a process's devices (default 1: each device holds all)",
    )


def sampling_options(args):
    """Return the `SampleOptions` of parsed arguments. Raises InputError if a value is out of range."""
    from mvar_jax.sampling.sampler import SampleOptions

    return SampleOptions(args.cfg, args.top_k, args.top_p, args.smooth, args.temperature)


def check_positive(args, *names: str) -> None:
    """Raise InputError for the first of these arguments that is below 1."""
    for name in names:
        given = getattr(args, name)
        if given < 1:
            raise InputError(
                f"--{name} must be 1 or more, got {given}", field=name, given=given, expected="1 or more"
            )
