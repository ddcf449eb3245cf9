"""Measure a digits run (reconstructions, samples, copies, codebook, curves) and write its report and figures."""

SUMMARY = "measure a digits run and write its report"


def add_arguments(parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--transformer", required=True, metavar="DIR", help="training workdir of the transformer")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="training workdir of the tokenizer")
    parser.add_argument("--samples", required=True, metavar="DIR", help="output of `sample --save_tokens`")
    parser.add_argument("--refiner", metavar="DIR", help="training workdir of the transformer's refiner, if any")
    parser.add_argument("--refined_samples", metavar="DIR", help="as --samples, drawn with the refiner")
    parser.add_argument("--stages", required=True, metavar="FILE", help="the log of launch/stage.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the report")


def run(args) -> int:
    """Run the command; the exit status is 0 even if a figure misses its bound, which the report states."""
    from mvar_jax.digits.measure_run import Drawn, report_digits
    from mvar_jax.digits.report import StageRecord
    from mvar_jax.errors import InputError, shorten
    from mvar_jax.files.json_files import read_json
    from mvar_jax.files.paths import as_path
    from mvar_jax.processes.holding import hold

    if (args.refiner is None) != (args.refined_samples is None):
        message = "--refiner and --refined_samples must be given together"
        raise InputError(message, field="refiner", given=args.refiner, expected="both or neither")
    names = ["transformer", "tokenizer", "samples", "stages", "out"]
    names = ([] if args.refiner is None else ["refiner", "refined_samples"]) + names
    paths = {name: as_path(getattr(args, name), name) for name in names}
    for name in names[:-1]:
        if not paths[name].exists():
            given = getattr(args, name)
            raise InputError(f"--{name}={given} does not exist", field=name, given=given, expected="an existing path")
    try:
        stages = read_json(paths["stages"], dict[str, StageRecord])
    except (OSError, ValueError) as error:
        message = f"--stages={args.stages} must be the JSON log that launch/stage.py writes: {shorten(error)}"
        raise InputError(message, field="stages", given=args.stages, expected="a JSON log") from None
    with hold("out", paths["out"]):
        base = Drawn(paths["transformer"], paths["samples"])
        refined = Drawn(paths["refiner"], paths["refined_samples"], "refined_samples") if "refiner" in paths else None
        passed = report_digits(paths["tokenizer"], base, refined, stages, paths["out"])
    print((paths["out"] / "report.md").read_text())
    print("all requirements passed" if passed else "some requirements failed, see the table")
    return 0
