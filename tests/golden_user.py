"""Run the golden case as a user does, by the commands and the Python API alone; test_default_flags.py compares.

python golden_user.py OUT    an empty folder; gets the converted model and results.npz
"""

import os
import sys
from pathlib import Path

import eval_case
import numpy as np
import torch_files

import mvar_jax
from mvar_jax import evaluation
from mvar_jax.__main__ import main

GOLDEN = Path(__file__).parent / "golden" / "tiny"


def run(out: Path) -> None:
    assert "XLA_FLAGS" not in os.environ
    files = ["--tokenizer", str(GOLDEN / "vae.pth"), "--transformer", str(GOLDEN / "mvar.pth")]
    assert main(["convert", *files, "--out", str(out / "model")]) == 0
    model = mvar_jax.load(out / "model")
    tokenizer, train, sample = (np.load(GOLDEN / f"{name}.npz") for name in ("tokenizer", "train", "sample_cfg2.7"))
    images_BYX3 = (2 * tokenizer["image_u8"].astype(np.float32) / 255 - 1).transpose(0, 2, 3, 1)
    ids_BL = model.encode(images_BYX3)
    logits_BLV = model.logits(tokenizer["ids"], train["labels"])
    samples_BYX3, sampled_BL = model.sample(sample["labels"], cfg=2.7, top_k=1)
    torch_files.save(out / "inception.pth", eval_case.inception_state())
    scored_BYX3 = eval_case.images("image/64x64", 2, 64, 64)
    features = evaluation.inception_features(scored_BYX3, out / "inception.pth")
    arrays = {"ids": ids_BL, "logits": logits_BLV, "samples": samples_BYX3, "sampled": sampled_BL}
    np.savez(out / "results.npz", **arrays, **features._asdict())


if __name__ == "__main__":
    run(Path(sys.argv[1]))
