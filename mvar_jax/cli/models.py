"""The model that a command uses: its directory, checkpoint, tokenizer, dtype and precision."""

from mvar_jax.errors import InputError


def add_model_arguments(parser) -> None:
    """Add --checkpoint, --which, --dtype and --precision."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    add_loading_arguments(parser)


def add_loading_arguments(parser) -> None:
    """Add --which, --dtype and --precision."""
    parser.add_argument(
        "--which", choices=("last", "best"), default="last", help="checkpoint of a workdir (default last)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the computation and of the transformer's weights (default: the model's own, float32 weights)",
    )
    add_precision_argument(parser)


def add_precision_argument(parser) -> None:
    """Add --precision, for the commands that run a model."""
    parser.add_argument(
        "--precision",
        choices=("standard", "exact"),
        help="standard: an accelerator may round float32 operands of blocks, encoder and decoder; exact: none "
        "(default: the model's own)",
    )


def add_tokenizer_argument(parser) -> None:
    """Add --tokenizer."""
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="model directory or workdir of the tokenizer, if --checkpoint holds a transformer alone or is to be "
        "used with another one",
    )


def load_for_sampling(args):
    """Return (`Model`, its networks in the dtype that is asked for on this process's devices, their mesh).

    Raises InputError if there is no such model, or --weight_shards does not divide the devices.
    """
    import jax

    from mvar_jax.api import load
    from mvar_jax.sampling.bulk import place_networks
    from mvar_jax.sharding import make_mesh

    devices = jax.local_devices()
    if len(devices) % args.weight_shards:
        expected = f"a divisor of {len(devices)}, the number of this process's devices"
        message = f"--weight_shards must be {expected}, got {args.weight_shards}"
        raise InputError(message, field="weight_shards", given=args.weight_shards, expected=expected)
    mesh = make_mesh(fsdp=args.weight_shards, devices=devices)
    model = load(args.checkpoint, args.which, args.tokenizer, args.precision, *refiner_of(args), switch_of(args))
    return model, place_networks(model.networks, mesh, args.dtype), mesh


def load_as_asked(args):
    """Return the `Model` that the arguments name, in their dtype and precision; see `mvar_jax.load`."""
    from mvar_jax.api import Model, load

    tokenizer = getattr(args, "tokenizer", None)
    model = load(args.checkpoint, args.which, tokenizer, args.precision, *refiner_of(args), switch_of(args))
    return Model(model.networks.with_dtype(args.dtype), model.classes)


def refiner_of(args) -> tuple[bool, tuple[int, ...] | None]:
    """Return whether the arguments ask for the refiner, and for which scales."""
    from mvar_jax.cli.sampling import refined_scales

    return ("refiner" in args and args.refiner == "on"), (refined_scales(args) if "refiner" in args else None)


def switch_of(args) -> tuple[int, str] | None:
    """Return scale and directory of --switch, None if it is not given. Raises InputError unless it is both."""
    given = getattr(args, "switch", None)
    if given is None:
        return None
    scale, _, directory = given.partition(":")
    if not scale.isdecimal() or not directory:
        expected = "SCALE:DIR, such as 8:models/mvar-d16"
        message = f"--switch must be {expected}, got {given!r}"
        raise InputError(message, field="switch", given=given, expected=expected)
    return int(scale), directory
