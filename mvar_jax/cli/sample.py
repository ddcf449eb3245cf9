"""Sample images of given classes: grid.png, one PNG per image, and samples.npz in the ADM evaluator's format.

Files and arrays go round-robin over the labels. Resumable: rerunning the command continues, and leaves the same files
as an uninterrupted run.
"""

from mvar_jax.cli.machine import add_machine_arguments, print_machine, use_compilation_cache
from mvar_jax.cli.models import add_model_arguments, add_tokenizer_argument, load_for_sampling
from mvar_jax.cli.sampling import add_drawing_arguments, add_sampling_arguments, check_positive, sampling_options
from mvar_jax.processes import group

SUMMARY = "sample images of given classes"


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--labels",
        required=True,
        metavar="L,L",
        help='classes by number, range or name, as "207,0-9,golden retriever"; name:7 is the class that is called 7, '
        "'#7' class number 7; a comma inside a name needs a backslash before it",
    )
    parser.add_argument("--num", type=int, default=8, metavar="N", help="images of each label (default 8)")
    add_sampling_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the samples; one run's alone")
    parser.add_argument("--save_tokens", action="store_true", help="also write tokens.npz: ids, labels, f_hat")
    parser.add_argument("--batch_size", type=int, default=64, metavar="B", help="images per batch (default 64)")
    add_drawing_arguments(parser)
    add_machine_arguments(parser)


def run(args) -> int:
    """Run the command; everything is checked before the first file is written."""
    from mvar_jax.files.paths import as_path
    from mvar_jax.values import as_seed

    options = sampling_options(args)
    check_positive(args, "num", "batch_size", "weight_shards")
    as_seed(args.seed)
    checkpoint, out = as_path(args.checkpoint, "checkpoint"), as_path(args.out, "out")
    use_compilation_cache(args.compilation_cache)

    import jax

    from mvar_jax.checkpoints.class_names import class_names_of
    from mvar_jax.processes.holding import owned_folder
    from mvar_jax.sampling.bulk import draw_all
    from mvar_jax.sampling.order import Order, is_by_label
    from mvar_jax.stopping import StopFlag

    if group.current().count > 1:
        print_machine()
    labels = class_names_of(checkpoint).numbers_of(args.labels)
    model, networks, mesh = load_for_sampling(args)
    labels = model.labels(labels)
    options.check_scales(len(model.tokenizer.sides))
    order = Order(
        tuple(labels.tolist()),
        args.num,
        options,
        args.seed,
        args.batch_size,
        args.save_tokens,
        args.truncate_uint8,
        group.current().gather("the order of the samples", is_by_label(out))[0],
    )
    owning = owned_folder("out", out, "sample", order.identity(networks))
    with owning, StopFlag(notice="stopping after this batch") as stop:
        is_new = draw_all(
            networks,
            order,
            out,
            mesh,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            wait=lambda: group.current().wait_for_all("sample"),
            check_stop=stop.raise_if_set,
        )
    if jax.process_index() == 0:
        print(f"{out}: {len(order.labels_N)} images {'written' if is_new else 'already there'}")
    return 0
