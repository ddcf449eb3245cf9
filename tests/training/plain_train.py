"""The `train` command without TensorBoard, whose libraries take most of a short run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mvar_jax.__main__ import start
from mvar_jax.training import logging


class NoWriter:
    write_scalars = write_images = lambda self, step, values: None
    flush = close = lambda self: None


if __name__ == "__main__":
    logging._open_summary_writer = lambda folder: NoWriter()
    sys.exit(start())
