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
from mvar_jax.ops.window import BACKENDS

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
"""


def test_sharded_batch_and_heads_give_the_same_numbers_without_communication():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", FOUR_DEVICES, *BACKENDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [word for name in BACKENDS for word in ("equal", name)]
