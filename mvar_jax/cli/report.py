"""Measures a digits run (reconstructions, samples, copies, codebook, curves) and writes report.md, report.json
and the pictures beside them."""

import json
from pathlib import Path

SUMMARY = "measure a digits run and write its report"


def add_arguments(parser) -> None:
    """--tokenizer DIR --transformer DIR --samples DIR --stages FILE --out DIR."""
    parser.add_argument("--transformer", required=True, metavar="DIR", help="training workdir of the transformer")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="training workdir of the tokenizer")
    parser.add_argument("--samples", required=True, metavar="DIR", help="what `sample --save_tokens` wrote")
    parser.add_argument("--stages", required=True, metavar="FILE", help="the log of launch/stage.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the report")


def run(args) -> int:
    """Exit status 0 also where a figure misses its bound: the report says so."""
    from mvar_jax.digits.measure_run import report_digits
    from mvar_jax.errors import InputError

    for name in ("transformer", "tokenizer", "samples", "stages"):
        if not Path(getattr(args, name)).exists():
            raise InputError(name, getattr(args, name), "an existing file or directory")
    try:
        stages = json.loads(Path(args.stages).read_text())
    except ValueError:
        raise InputError("stages", args.stages, "the JSON log that launch/stage.py writes") from None
    passed = report_digits(Path(args.tokenizer), Path(args.transformer), Path(args.samples), stages, Path(args.out))
    print((Path(args.out) / "report.md").read_text())
    print("every bound is met" if passed else "some bounds are missed: see the table")
    return 0
