"""Importing changes nothing: a fresh process imports every module of mvar_jax and compares before and after."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, logging, os, pkgutil, warnings

# the libraries first: what they change at import is theirs
import absl.logging, grain.python, jax, ml_collections.config_flags, numpy, optax, orbax.checkpoint, PIL.Image
import scipy.ndimage, scipy.special, sklearn.datasets, tqdm
import jax.experimental.pallas.triton, jax.experimental.multihost_utils, jax.experimental.topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel


def loggers():
    named = {name: x for name, x in logging.root.manager.loggerDict.items() if isinstance(x, logging.Logger)}
    return {
        name: (x.level, x.disabled, x.propagate, tuple(map(id, x.filters)), tuple(map(id, x.handlers)))
        for name, x in [("root", logging.root), *named.items()]
    }


def handlers():
    registry = orbax.checkpoint.type_handlers
    return {ty: id(registry.get_type_handler(ty)) for ty in registry.supported_types()}


def state():
    return {
        "loggers": loggers(),
        "warnings": list(warnings.filters),
        "orbax": handlers(),
        "environ": dict(os.environ),
        "jax": {name: jax.config._read(name) for name in jax.config.values},
    }


before = state()
import mvar_jax

for module in pkgutil.walk_packages(mvar_jax.__path__, "mvar_jax."):
    importlib.import_module(module.name)
    print(module.name)
after = state()
for name in before["loggers"]:
    assert after["loggers"][name] == before["loggers"][name], f"logger {name} changed"
for name in after["loggers"]:
    if name.startswith("mvar_jax"):
        assert after["loggers"][name] == (logging.NOTSET, False, True, (), ()), f"logger {name} was set up"
for name in ("warnings", "orbax", "environ", "jax"):
    assert after[name] == before[name], f"{name}: {before[name]} became {after[name]}"
"""


def test_importing_every_module_changes_nothing_in_the_process():
    """Loggers, warning filters, Orbax's type handlers, environment and JAX's options are those of before.

    Whoever imports mvar_jax keeps the process as it was; set-up belongs into functions that commands call. A filter,
    handler or variable that a module sets at its top level breaks this.
    """
    root = Path(__file__).parent.parent
    # not the variables of this process, which has imported much of mvar_jax
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = kept | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, cwd=root
    )
    assert result.returncode == 0, result.stderr
    modules = sorted((root / "mvar_jax").rglob("*.py"))
    assert len(result.stdout.splitlines()) == len(modules) - 1  # all but mvar_jax itself
