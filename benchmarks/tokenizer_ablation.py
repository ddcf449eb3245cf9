"""What each part of the tokenizer's recipe does: equal short runs of the photographs' tokenizer, one change each.

    python benchmarks/tokenizer_ablation.py --out runs/ablation

Each run is `configs/tokenizer_photos.py:NUM_STEPS` with the keys of RUNS; a complete one is not repeated. About 3
minutes a run on two CPU cores. Prints and writes ablation.md: PSNR of all and of the first three scales on held-out
crops and perplexity of each scale there, from averaged weights; usage of each scale by the published margin and by
its own, in training.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # so that it runs from a checkout that is not installed

from configs.tokenizer_photos import get_config
from mvar_jax.__main__ import main as run_command
from mvar_jax.digits.measure_run import read_metrics

PLAIN = {"adversary.kind": "none", "codebook.scale_dropout": 0.0}
NO_REVIVAL = {"codebook.revive_every_steps": 0, "codebook.revive_until_step": 0}
NUM_SCALES = len(get_config().model.sides)
# name -> keys of the config
RUNS = {
    "re-drawing, 4 phi": PLAIN,
    "... with the adversary": {"codebook.scale_dropout": 0.0},
    "... with scale dropout": {"adversary.kind": "none"},
    "... with both (the config)": {},
    "drawn once": PLAIN | NO_REVIVAL,
    "drawn once, SimVQ": PLAIN | NO_REVIVAL | {"codebook.simvq": True},
    "1 phi": PLAIN | {"model.num_phi": 1},
    f"{NUM_SCALES} phi, one a scale": PLAIN | {"model.num_phi": NUM_SCALES},
}
HEAD = ("run", "PSNR, dB", "r3, dB", "SSIM", "codes used, %", "perplexity", "published usage, %", "own usage, %")


def train(workdir: Path, num_steps: int, changes: dict) -> tuple[dict, dict]:
    """Return the last line of evaluation and of training of a run."""
    end = {f"{name}_every_steps": num_steps for name in ("eval", "picture", "save")}
    config = f"{ROOT / 'configs/tokenizer_photos.py'}:{num_steps}"
    keys = [f"--config.{name}={value}" for name, value in (end | changes).items()]
    if status := run_command(["train", "--config", config, "--workdir", str(workdir), *keys]):
        sys.exit(status)
    return read_metrics(workdir, "eval")[-1], read_metrics(workdir, "train")[-1]


def make_row(name: str, held_out: dict, training: dict) -> str:
    """Return a run's line of the table."""
    listed = lambda values: " ".join(f"{value:.0f}" for value in values)
    cells = [
        name,
        f"{held_out['psnr_db']:.2f}",
        f"{held_out['psnr_per_scale_db'][2]:.2f}",
        f"{held_out['ssim']:.3f}",
        f"{held_out['codebook_used_percent']:.1f}",
        listed(held_out["perplexity_per_scale"]),
        listed(training["usage_per_scale"]),
        listed(training["own_usage_per_scale"]),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--num_steps", type=int, default=240)
    parser.add_argument("--only", help="numbers of runs from 0, separated by commas (default: all)")
    args = parser.parse_args()
    chosen = [int(number) for number in args.only.split(",")] if args.only else range(len(RUNS))
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for number in chosen:
        name, changes = list(RUNS.items())[number]
        lines.append(make_row(name, *train(args.out / f"run{number}", args.num_steps, changes)))
        (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
