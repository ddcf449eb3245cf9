"""Every backend on four virtual devices: batch and heads sharded, and inside shard_map; a raw product, sharded."""

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
from mvar_jax.ops.triton_attention import attend_raw
from mvar_jax.ops.window import BACKENDS
from mvar_jax.ops.window.pallas_gpu import Window
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

# a raw product: the parameters' gradients are sums over the batch
rule = Window(5, 6, 3, 3)
product = jnp.stack([part.reshape(4, 30, 4, 8) for part in (q, k, v)], axis=2)
rows = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 8)), jnp.float32)
raw = (product, rows[0], rows[1], jnp.asarray([1.0, 2.0, 3.0, 4.0]))
pull_raw = jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend_raw(rule, *x, interpret=True))), argnums=(0, 1, 2, 3))
expected = jax.jit(pull_raw)(*raw)
for heads in (None, "h"):
    specs = (P("b", None, None, heads), P(heads), P(heads), P(heads))
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    out_shardings = (NamedSharding(mesh, P()), shardings)
    program = jax.jit(pull_raw, in_shardings=shardings, out_shardings=out_shardings).lower(*raw).compile()
    for word in ("all-gather", "all-to-all", "collective-permute"):
        assert word not in program.as_text(), ("raw", heads, word)
    for ours, theirs in zip(jax.tree.leaves(program(*raw)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=f"raw {heads}")
    print("equal raw", heads)

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
    lines = [*(f"equal {name}" for name in BACKENDS), "equal raw None", "equal raw h", "mapped tiled", "mapped band"]
    assert done.stdout.splitlines() == lines
