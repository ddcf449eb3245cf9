"""Whole runs of `evaluate` with Inception weights by a formula: beside the published evaluator, and on digits.

    python benchmarks/evaluate_digits.py --run runs/quickstart --out runs/evaluate_digits

The first run scores 56 images against 40 others, by a formula too, which the evaluator of guided-diffusion (on
TensorFlow) has scored with the same weights: tests/golden/eval/adm_run.json. The second scores the samples of the
quickstart against the digits that it held out; nobody else has a figure for it, and with these weights it says
nothing about their quality. 12 minutes on one CPU core. The exit status is 1 if a figure is off.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # so that it runs from a checkout that is not installed

import eval_case
import numpy as np
import torch_files

from mvar_jax.__main__ import main as run_command

# score -> (its name in the golden run, largest relative difference)
GOLDEN = {
    "fid": ("fid_exact", 2e-5),
    "sfid": ("sfid_exact", 2e-5),
    "inception_score": ("inception_score_split5000", 2e-6),
    "precision": ("precision_float64", 0.002),
    "recall": ("recall_float64", 0.002),
}


def evaluate(out: Path, *args) -> dict:
    """Run the command and return evaluation.json."""
    if status := run_command(["evaluate", *map(str, args), "--out", str(out)]):
        sys.exit(status)
    return json.loads((out / "evaluation.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of the quickstart; without it only the first run")
    parser.add_argument("--num", type=int, default=200, help="samples of the quickstart (default 200)")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate_digits"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    inception = args.out / "inception.npz"
    if not inception.exists():
        torch_files.save(args.out / "formula.pth", eval_case.inception_state())
        if status := run_command(["convert", "--inception", str(args.out / "formula.pth"), "--out", str(inception)]):
            return status
    golden = eval_case.load("adm_run.json")
    num_references, num_samples, side = golden["counts"]
    for name, num in (("ref", num_references), ("sample", num_samples)):
        np.savez(args.out / f"{name}.npz", arr_0=eval_case.images(f"adm/{name}", num, side, side))
    sets = ("--samples", args.out / "sample.npz", "--reference", args.out / "ref.npz", "--inception", inception)
    found, is_fine = evaluate(args.out / "golden", *sets), True
    print("| score | here | published evaluator | relative difference | allowed |\n| --- | --- | --- | --- | --- |")
    for name, (key, allowed) in GOLDEN.items():
        difference = abs(found[name] / golden[key] - 1)
        is_fine &= difference <= allowed
        print(f"| {name} | {found[name]:.8g} | {golden[key]:.8g} | {difference:.1e} | {allowed:.0e} |")
    if args.run:
        with np.load(Path(args.run) / "samples.npz") as samples:
            rows = np.arange(args.num) * len(samples["arr_0"]) // args.num  # of all labels
            np.savez(args.out / "digits.npz", arr_0=samples["arr_0"][rows], arr_1=samples["arr_1"][rows])
        sets = ("--samples", args.out / "digits.npz", "--reference", "digits:val", "--inception", inception)
        evaluate(args.out / "digits", *sets)
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
