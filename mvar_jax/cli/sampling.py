"""The options of a draw, the same for every command that draws."""


def add_sampling_arguments(parser) -> None:
    """--cfg, --top_k, --top_p, --temperature and --smooth."""
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance (default 1.5)")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest codes; 0: all (default)")
    parser.add_argument(
        "--top_p", type=float, default=0.0, help="keep the likeliest codes of mass p; 0: all (default)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="above 1: more varied draws, below 1: likelier (default 1)",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="Gumbel-average mode: smoother pictures, for looking at"
    )
