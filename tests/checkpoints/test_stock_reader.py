"""What is written is Orbax's own format: an Orbax that knows nothing of mvar_jax lists and restores it."""

import os
import subprocess
import sys

import jax
import numpy as np
from test_manager import make_state, save

from mvar_jax.checkpoints.trees import save_tree

READ = """
import sys
import jax
import numpy as np
import orbax.checkpoint as ocp

folder, kind, out = sys.argv[1:]
checkpointer = getattr(ocp, kind)()
stored = checkpointer.metadata(folder).item_metadata.tree
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored)
if kind == "StandardCheckpointer":
    tree = checkpointer.restore(folder, abstract)
else:
    tree = checkpointer.restore(folder, abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
leaves = jax.tree_util.tree_leaves_with_path(tree)
np.savez(out, **{jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves})
assert not any(name.startswith("mvar_jax") for name in sys.modules)
"""


def read_by_stock_orbax(folder, kind, out):
    command = [sys.executable, "-c", READ, str(folder), kind, str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=out.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(np.load(out))


def named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def test_stock_orbax_lists_and_restores_a_checkpoint(tmp_path):
    state = make_state()
    save(tmp_path, state)
    found = read_by_stock_orbax(tmp_path / "checkpoints/3/params", "StandardCheckpointer", tmp_path / "out.npz")
    np.testing.assert_equal(found, named_leaves(state.params))


def test_stock_orbax_lists_and_restores_a_weight_tree(tmp_path):
    save_tree(tmp_path / "weights", make_state().params)
    found = read_by_stock_orbax(tmp_path / "weights", "PyTreeCheckpointer", tmp_path / "out.npz")
    np.testing.assert_equal(found, named_leaves(make_state().params))
