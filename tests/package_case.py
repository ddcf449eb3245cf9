"""What a plain `pip install .` promises, in a process that cannot import TensorFlow; test_package.py runs it.

python package_case.py MODEL GOLDEN OUT    a tiny model directory, published weights, an empty folder
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

OPTIONAL = ("tensorflow", "tensorboard", "clu", "tensorflow_datasets", "keras")


class FinderWithoutOptional(PathFinder):
    """Find modules on the path as if the packages of the extras were not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else super().find_spec(name, path, target)


def main(model: Path, golden: Path, out: Path) -> None:
    sys.meta_path[sys.meta_path.index(PathFinder)] = FinderWithoutOptional
    import numpy as np

    import mvar_jax
    from mvar_jax.__main__ import main as mvar

    both = ["--tokenizer", str(golden / "vae.pth"), "--transformer", str(golden / "mvar.pth")]
    assert mvar(["convert", *both, "--out", str(out / "converted")]) == 0

    loaded = mvar_jax.load(model)
    side = loaded.tokenizer.image_size
    images_BYX3 = np.zeros((1, side, side, 3), np.float32)
    assert loaded.encode(images_BYX3).shape == (1, loaded.num_tokens)
    mask_YX = np.broadcast_to(np.arange(side)[:, None] < side // 2, (side, side))
    assert loaded.edit(images_BYX3, mask_YX, [1]) is not None
    sample = ["sample", "--checkpoint", str(model), "--labels", "0", "--num", "2"]
    assert mvar([*sample, "--out", str(out / "samples")]) == 0

    config = str(Path(__file__).parent.parent / "configs" / "debug.py")
    small = ["--config.num_steps=5", "--config.eval_every_steps=5"]
    assert mvar(["train", "--config", config, *small, "--workdir", str(out / "run")]) == 0
    assert (out / "run" / "metrics.jsonl").read_text().count("\n") >= 3


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
