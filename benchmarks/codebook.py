"""Remedies against unused codes, compared in equal runs of the digits' tokenizer.

    python benchmarks/codebook.py --out runs/codebook

Each run is `configs/digits_tokenizer.py` with other keys of `config.codebook`; a complete run is not repeated.
3 to 4 minutes a run on two CPU cores. Prints the table of benchmarks/RESULTS.md from the last evaluations: held-out
images, averaged weights.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # so that it runs from a checkout that is not installed

from mvar_jax.__main__ import main as run_command
from mvar_jax.digits.measure_run import read_metrics

NONE = {"revive_every_steps": 0, "revive_until_step": 0}
ENTROPY = {"entropy_weight": 0.05, "entropy_until_step": 240}
DROPOUT = {"scale_dropout": 0.1}
# name -> keys of config.codebook
RUNS = {
    "no remedy": NONE | {"warmup_steps": 0},
    "drawn start": NONE,
    "drawn start, re-drawing (the config)": {},
    "SimVQ": NONE | {"simvq": True},
    "entropy": NONE | ENTROPY,
    "re-drawing, entropy": ENTROPY,
    "re-drawing, scale dropout": DROPOUT,
    "re-drawing, entropy, scale dropout": ENTROPY | DROPOUT,
}


def train(workdir: Path, codebook: dict, overrides: list[str]) -> dict:
    """Return the last evaluation of a run."""
    keys = [f"--config.codebook.{name}={value}" for name, value in codebook.items()]
    command = ["train", "--config", str(ROOT / "configs/digits_tokenizer.py"), "--workdir", str(workdir)]
    if status := run_command([*command, *keys, *overrides]):
        sys.exit(status)
    return read_metrics(workdir, "eval")[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/codebook"))
    parser.add_argument("--only", help="names of runs, separated by semicolons (default: all)")
    args, overrides = parser.parse_known_args()
    names = args.only.split(";") if args.only else list(RUNS)
    lines = []
    for name in names:
        found = train(args.out / name.replace(" ", "_").replace(",", ""), RUNS[name], overrides)
        perplexities = ", ".join(f"{x:.0f}" for x in found["perplexity_per_scale"])
        own = ", ".join(f"{x:.0f}" for x in found["own_usage_per_scale"])
        r3, used = found["psnr_per_scale_db"][2], found["codebook_used_percent"]
        lines.append(f"| {name} | {found['psnr_db']:.2f} | {r3:.2f} | {used:.1f} | {perplexities} | {own} |")
    print("| run | PSNR, dB | r3, dB | codes used, % | perplexity by scale | own usage by scale, % |")
    print("\n".join(["| --- | --- | --- | --- | --- | --- |", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
