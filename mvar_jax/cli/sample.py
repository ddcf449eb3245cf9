"""Draws images of given classes: grid.png, one PNG an image, and samples.npz (the ADM evaluator's form).

Killed and started again with the same options it goes on, and leaves the same files.
"""

from pathlib import Path

from mvar_jax.cli.machine import add_machine_arguments, set_up_machine, wait_for_all
from mvar_jax.cli.sampling import add_sampling_arguments

SUMMARY = "draw images from a model"


def add_arguments(parser) -> None:
    """See --help."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model directory or training workdir")
    parser.add_argument(
        "--which", choices=("last", "best"), default="last", help="of a workdir's checkpoints (default last)"
    )
    parser.add_argument(
        "--labels", required=True, metavar="L,L", help="classes, as 207,360, or a range 0-9, or 'golden retriever'"
    )
    parser.add_argument("--num", type=int, default=8, metavar="N", help="images of each label (default 8)")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the samples")
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="images at a time (default 64)")
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids, labels, f_hat")
    parser.add_argument("--truncate_uint8", action="store_true", help="round pixels down, as the published program")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation and the transformer's weights (default: the model's own, float32 weights)",
    )
    parser.add_argument(
        "--weight_shards",
        type=int,
        default=1,
        metavar="N",
        help="cut the transformer's weights over N of a process's devices (default 1: each holds all)",
    )
    add_machine_arguments(parser)


def run(args) -> int:
    """Checks everything before the first file is written."""
    from mvar_jax.cli.labels import parse_labels
    from mvar_jax.errors import InputError
    from mvar_jax.ops.sampling import check_sampling_options

    check_sampling_options(args.cfg, args.top_k, args.top_p, args.temperature)
    for name in ("num", "batch_size", "weight_shards"):
        if getattr(args, name) < 1:
            raise InputError(name, getattr(args, name), "1 or more")
    if not 0 <= args.seed < 2**32:
        raise InputError("seed", args.seed, "an integer from 0 to 2**32 - 1")
    set_up_machine(args.distributed, args.compilation_cache)

    import jax

    from mvar_jax.api import check_labels, load
    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.files.directories import make_directory
    from mvar_jax.sampling.bulk import Order, draw_all, place_networks
    from mvar_jax.sampling.sampler import SampleOptions
    from mvar_jax.sharding import make_mesh

    labels = parse_labels(args.labels, class_names_of(Path(args.checkpoint)))
    devices = jax.local_devices()
    if len(devices) % args.weight_shards:
        raise InputError("weight_shards", args.weight_shards, f"a divisor of {len(devices)}, this process's devices")
    mesh = make_mesh(fsdp=args.weight_shards, devices=devices)
    model = load(args.checkpoint, args.which)
    check_labels(labels, model.num_classes)
    networks = place_networks(model.networks, mesh, args.dtype)
    out = Path(args.out)
    make_directory(out)
    order = Order(
        tuple(labels.tolist()),
        args.num,
        SampleOptions(args.cfg, args.top_k, args.top_p, args.smooth, args.temperature),
        args.seed,
        args.batch_size,
        args.save_tokens,
        args.truncate_uint8,
    )
    is_new = draw_all(
        networks,
        order,
        out,
        mesh,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        wait=lambda: wait_for_all("sample"),
    )
    if jax.process_index() == 0:
        print(f"{out}: {len(order.labels_N)} images {'written' if is_new else 'already there'}")
    return 0
