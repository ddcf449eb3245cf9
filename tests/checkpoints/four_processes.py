"""One of four processes that save and restore a sharded state: python four_processes.py WORKDIR HOST:PORT INDEX."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.training.state import TrainState

SIDE = 1024


def make_state(step, spec):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    make = lambda: TrainState(
        jnp.int32(step), {f"layer_{i}": step + i + jnp.arange(1.0 * SIDE**2).reshape(SIDE, SIDE) for i in range(4)},
        None, {}, {},
    )  # fmt: skip
    place = lambda x: NamedSharding(mesh, spec if x.ndim else P())
    shardings = jax.tree.map(place, jax.eval_shape(make))
    state = jax.jit(make, out_shardings=shardings)()
    return state, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )


def counted(name):
    """Bytes that this process has read or written so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields[name])


def checked_step(state):
    """Return the step of a restored state if its values are those of that step."""
    expected, _ = make_state(int(state.step), P(None, "fsdp"))
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    return int(state.step)


def restore(workdir, abstract):
    with Checkpoints(workdir, 3) as checkpoints:
        before = counted("rchar")
        state = checkpoints.restore(abstract, say=lambda line: print("said", line, flush=True))
        num_read = counted("rchar") - before
    return checked_step(state), num_read


def main(workdir, address, index):
    jax.distributed.initialize(address, 4, int(index))
    sharded, abstract = make_state(1, P(None, "fsdp"))
    with Checkpoints(workdir, 3) as checkpoints:
        checkpoints.save(sharded, {})
        checkpoints.wait()
        before = counted("wchar")
        checkpoints.save(make_state(2, P())[0], {})  # every process holds all
        checkpoints.wait()
        print("written", counted("wchar") - before, flush=True)
        checkpoints.save(make_state(3, P(None, "fsdp"))[0], {})
    for _ in range(2):
        print("restored", *restore(workdir, abstract), flush=True)
        if index == "0" and (path := Path(workdir) / "checkpoints/3/params/layer_2/c/0/3").exists():
            data = bytearray(path.read_bytes())  # read by process 3 alone
            data[1000] ^= 1
            path.write_bytes(data)
    with Checkpoints(workdir, 3) as checkpoints:
        checkpoints.save(make_state(3, P(None, "fsdp"))[0], {})
    print("restored", *restore(workdir, abstract), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
