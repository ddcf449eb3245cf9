"""A machine, a training step and the config of a small run, for what plans make of figures."""

from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.hardware.machines import Machine
from mvar_jax.planning.figures import Figures
from mvar_jax.training.programs import TRAIN

MACHINE = Machine("m", "", "gpu", (), {"float32": 1e9, "bfloat16": 2e9}, 200, 100, 1e6, 1e5, 1e4)
STEP = Figures(TRAIN, "step", 10, 8, 0.0, 10, 20, 31, 100, False, 1.0)
CONFIG = read_config("debug_transformer", [])
TOKENIZER = build.build_module(read_config("debug", []))
