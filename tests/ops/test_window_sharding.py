"""Every backend on four virtual devices: batch and heads sharded, and inside shard_map."""

import os
import subprocess
import sys
from pathlib import Path

from mvar_jax.ops.window import BACKENDS

FOUR_DEVICES = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.window import BACKENDS
from mvar_jax.sharding import make_mesh, spec_of, use_mesh

x = np.random.default_rng(0).normal(size=(3, 4, 5, 6, 4, 8))
q, k, v = (jnp.asarray(part, jnp.float32) for part in x)
mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
spec = P("b", None, None, "h")
place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
for name in sys.argv[1:]:
    options = {"interpret": True} if name.startswith("pallas") else {}
    attend = lambda q, k, v: BACKENDS[name](q, k, v, 3, 0.5, **options)
    loss = lambda q, k, v: (attend(q, k, v), *jax.vjp(attend, q, k, v)[1](jnp.cos(q)))
    expected = jax.jit(loss)(q, k, v)
    sharded = jax.jit(loss, out_shardings=(NamedSharding(mesh, spec),) * 4)
    program = sharded.lower(place(q), place(k), place(v)).compile()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in program.as_text(), (name, word)
    mapped = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=not options))
    for results in (program(place(q), place(k), place(v)), mapped(q, k, v)):
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)
    print("equal", name)

# what TPUs use: shard_map over the context's mesh
mesh = make_mesh(data=2, tensor=2)
sharding = NamedSharding(mesh, spec_of(("batch", None, None, "heads", None)))
arrays = [jax.device_put(x, sharding) for x in (q, k, v)]
with compiling_for("tpu"), use_mesh(mesh):
    for name in ("tiled", "band"):
        attend = lambda q, k, v: BACKENDS[name](q, k, v, 3, 0.5)
        loss = lambda q, k, v: (attend(q, k, v), *jax.vjp(attend, q, k, v)[1](jnp.cos(q)))
        program = jax.jit(loss, out_shardings=(sharding,) * 4).lower(*arrays).compile()
        assert "custom_partitioning" not in str(jax.make_jaxpr(loss)(*arrays)), name
        for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert word not in program.as_text(), (name, word)
        for ours, theirs in zip(program(*arrays), jax.jit(loss)(q, k, v), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)
        odd = [x[:3, ..., :3, :] for x in (q, k, v)]  # the mesh divides neither axis: whole on every device
        np.testing.assert_allclose(jax.jit(attend)(*odd), attend(q, k, v)[:3, ..., :3, :], atol=1e-6)
        print("mapped", name)
"""


def test_sharded_batch_and_heads_give_the_same_numbers_without_communication():
    """Output and gradients equal the unsharded ones, and the compiled program has no collective.

    Attention is independent over batch and heads, so a collective means that a partitioning rule is missing and XLA
    gathers whole arrays. One child process runs all backends, since the number of devices is fixed at start.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", FOUR_DEVICES, *BACKENDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [*(f"equal {name}" for name in BACKENDS), "mapped tiled", "mapped band"]
    assert done.stdout.splitlines() == lines
