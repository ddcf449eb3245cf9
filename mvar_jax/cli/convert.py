"""Convert published PyTorch weights to a model directory, or back."""

import argparse
import sys

from mvar_jax.errors import InputError

SUMMARY = "convert published PyTorch weights, or convert back"

SCORES = ("inception", "lpips", "dino")
BACK = ("to_torch", "to_safetensors")
FROM_TORCH_OPTIONS = (
    "tokenizer",
    "transformer",
    "out",
    "from_hub",
    "patch_nums",
    "kernel_size",
    "refine_step",
    "conditioning",
    "znorm",
    "phi_ratio",
    "weights",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    forward = parser.add_argument_group("to a model directory")
    forward.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="published tokenizer, such as vae_ch160v4096z32.pth; also .safetensors, or the index of shards",
    )
    forward.add_argument(
        "--transformer", metavar="FILE", help="published MVAR or VAR transformer, or a trainer's state"
    )
    forward.add_argument(
        "--weights", metavar="NAME", help="which state dict to take of a file that holds several, such as ema"
    )
    forward.add_argument("--out", metavar="PATH", help="model directory, or .npz file, to write; new")
    forward.add_argument(
        "--from_hub",
        metavar="REPO",
        nargs="+",
        help="take the files from this Hugging Face repository; two: the tokenizer's, then the transformer's",
    )
    forward.add_argument("--patch_nums", metavar="N,N,...", help="side of each token map (default: from the file)")
    forward.add_argument("--kernel_size", metavar="K", help="window side, or one per scale from refine_step on")
    forward.add_argument("--refine_step", metavar="N", help="first scale that attends to a local window")
    forward.add_argument("--conditioning", metavar="C", help="markov (MVAR) or full (VAR)")
    words = "the tokenizer was trained with VAR's using_znorm (default: without)"
    forward.add_argument("--znorm", action="store_true", default=None, help=words)
    forward.add_argument("--phi_ratio", metavar="R", help="VAR's quant_resi of the tokenizer (default: 0.5)")
    scores = parser.add_argument_group("networks that score images or train a tokenizer, to one .npz file")
    scores.add_argument(
        "--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth or classify_image_graph_def.pb"
    )
    scores.add_argument(
        "--lpips", metavar="FILE", nargs=2, help="torchvision's vgg16-397923af.pth and vgg.pth of the lpips package"
    )
    scores.add_argument(
        "--dino", metavar="FILE", help="dino_deitsmall16_pretrain.pth, for a tokenizer's discriminator"
    )
    back = parser.add_argument_group("back to PyTorch")
    back.add_argument("--checkpoint", metavar="DIR", help="model directory or training workdir")
    back.add_argument("--to_torch", metavar="DIR", help="where to write vae.pth and mvar.pth; new or empty")
    back.add_argument(
        "--to_safetensors", metavar="DIR", help="where to write vae.safetensors and mvar.safetensors; new or empty"
    )
    back.add_argument(
        "--shard_mib", metavar="N", help="split safetensors of more than N MiB into several files with an index"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command in the direction that its options choose."""
    if any(getattr(args, name) is not None for name in SCORES):
        return _run_scores(args)
    if any(getattr(args, name) is not None for name in ("checkpoint", *BACK, "shard_mib")):
        return _run_back(args)
    from mvar_jax.convert.weights import MisfitError, convert

    if args.out is None:
        raise InputError("give --out, the directory to write", field="out", given=None, expected="a directory")
    options = {
        "patch_nums": _parse_integers("patch_nums", args.patch_nums),
        "kernel_size": _one_or_all(_parse_integers("kernel_size", args.kernel_size)),
        "refine_step": _parse_integer("refine_step", args.refine_step),
        "conditioning": args.conditioning,
        "znorm": args.znorm,
        "phi_ratio": _parse_number("phi_ratio", args.phi_ratio),
        "weights": args.weights,
    }
    paths = {"tokenizer": args.tokenizer, "transformer": args.transformer}
    if args.from_hub is not None:
        paths = _download(args.from_hub, paths)
    try:
        modules = convert(paths["tokenizer"], paths["transformer"], args.out, **options)
    except MisfitError as error:
        print("\n".join(error.misfits), file=sys.stderr)
        raise
    print(f"wrote {args.out}: {', '.join(sorted(modules))}")
    return 0


def _run_scores(args: argparse.Namespace) -> int:
    from mvar_jax.evaluation.dino_weights import convert_dino
    from mvar_jax.evaluation.inception_weights import convert_inception
    from mvar_jax.evaluation.lpips import convert_lpips

    chosen, *others = sorted(SCORES, key=lambda name: getattr(args, name) is None)
    for name in (*others, *FROM_TORCH_OPTIONS, "checkpoint", *BACK, "shard_mib"):
        if getattr(args, name) is not None and name != "out":
            message = f"--{name} cannot be combined with --{chosen}"
            raise InputError(message, field=name, given=getattr(args, name), expected=f"not with --{chosen}")
    if args.out is None:
        raise InputError("give --out, the .npz file to write", field="out", given=None, expected="a file")
    if args.inception is not None:
        weights = convert_inception(args.inception, args.out)
    elif args.lpips is not None:
        weights = convert_lpips(*args.lpips, args.out)
    else:
        weights = convert_dino(args.dino, args.out)
    for name, sha256 in weights.sources.items():
        print(f"read {name}, SHA-256 {sha256}")
    if weights.is_published is False:
        print("note: this is not the published file; its scores compare only with scores by the same file")
    print(f"wrote {args.out}")
    return 0


def _run_back(args: argparse.Namespace) -> int:
    from mvar_jax.convert.to_torch import to_safetensors, to_torch

    given = [name for name in BACK if getattr(args, name) is not None]
    if not given or args.checkpoint is None:
        name = "checkpoint" if given else "to_torch"
        message = f"give --{name} too: --checkpoint must be used together with --to_torch or --to_safetensors"
        raise InputError(message, field=name, given=None, expected="a directory")
    excluded = [name for name in FROM_TORCH_OPTIONS if getattr(args, name) is not None] + given[1:]
    if given == ["to_torch"] and args.shard_mib is not None:
        excluded.append("shard_mib")
    for name in excluded:
        message = f"--{name} cannot be combined with --{given[0]}"
        raise InputError(message, field=name, given=getattr(args, name), expected=f"not with --{given[0]}")
    if args.to_torch is not None:
        paths = to_torch(args.checkpoint, args.to_torch)
    else:
        paths = to_safetensors(args.checkpoint, args.to_safetensors, _parse_integer("shard_mib", args.shard_mib))
    for path in paths:
        print(f"wrote {path}")
    return 0


def _download(repos: list[str], filenames: dict[str, str | None]) -> dict[str, str | None]:
    from mvar_jax.convert.hub import download

    if len(repos) > 2:
        expected = "one repository, or the tokenizer's and then the transformer's"
        message = f"--from_hub must be {expected}, got {len(repos)}"
        raise InputError(message, field="from_hub", given=repos, expected=expected)
    if not any(filenames.values()):
        message = "with --from_hub give --tokenizer, --transformer or both, as names of files in the repository"
        raise InputError(message, field="tokenizer", given=None, expected="a file name")
    repo_of = {"tokenizer": repos[0], "transformer": repos[-1]}
    return {kind: name and str(download(repo_of[kind], name)) for kind, name in filenames.items()}


def _parse_integers(field: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        expected = "whole numbers separated by commas"
        message = f"--{field} must be {expected}, got {text!r}"
        raise InputError(message, field=field, given=text, expected=expected) from None


def _parse_integer(field: str, text: str | None) -> int | None:
    numbers = _parse_integers(field, text)
    if numbers is not None and len(numbers) != 1:
        expected = "one whole number"
        raise InputError(f"--{field} must be {expected}, got {text!r}", field=field, given=text, expected=expected)
    return numbers and numbers[0]


def _parse_number(field: str, text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        message = f"--{field} must be a number, got {text!r}"
        raise InputError(message, field=field, given=text, expected="a number") from None


def _one_or_all(numbers: tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers
