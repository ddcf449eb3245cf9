"""A toy task, and a process that trains it.

python toy_run.py WORKDIR NUM_STEPS STEP_S [HOST:PORT,NUM,INDEX] [sharded|own|slow]

sharded: the state is. own: the program joins the processes itself, without `run_together`. slow: files are slow in
the second process.
"""

import errno
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mvar_jax.errors import InputError
from mvar_jax.files.lines import read_lines
from mvar_jax.processes.together import run_together
from mvar_jax.training import logging
from mvar_jax.training.loop import LoopSettings, run
from mvar_jax.training.protocol import Task
from mvar_jax.training.state import TrainState

OPTIMIZER = optax.adamw(1e-2)


class NoWriter:
    write_scalars = write_images = lambda self, step, values: None
    flush = close = lambda self: None


def update(state, x_BD, step):
    """Noise is a function of the step, so that a resumed run draws the same."""

    def loss_of(params):
        noise_BD = 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(1), step), x_BD.shape)
        return jnp.mean((x_BD @ params["kernel_DD"] + noise_BD - 1) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.ema, params)
    metrics = {"loss": loss, "loss_per_scale": jnp.stack([loss, loss / 3]), "is_bad": ~jnp.isfinite(loss)}
    extra = {"num_seen": state.extra["num_seen"] + len(x_BD)}
    return TrainState(state.step + 1, params, ema, opt_state, extra), metrics


class ToyTask(Task):
    examples_per_step = 4

    def __init__(self, step_s=0.0, bad_steps=(), num_batches=10**6, on_step=None, is_sharded=False):
        mesh = jax.make_mesh((jax.process_count(),), ("data",), axis_types=(AxisType.Auto,))
        self._whole, self._rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data" if is_sharded else None))
        placed = (self._shardings(), self._whole) if is_sharded else None
        self._update = jax.jit(update, donate_argnums=0, out_shardings=placed)
        self._step_s, self._bad_steps, self._num_batches = step_s, bad_steps, num_batches
        self._on_step = on_step or (lambda step: None)
        self.num_inits = 0
        self.evaluated_steps = []

    def _init(self):
        params = {"kernel_DD": jax.random.normal(jax.random.key(0), (8, 8))}
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, ema, OPTIMIZER.init(params), {"num_seen": jnp.int32(0)})

    def init_state(self):
        self.num_inits += 1
        return jax.device_put(self._init(), self._shardings())

    def abstract_state(self):
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(place, jax.eval_shape(self._init), self._shardings())

    def _shardings(self):
        return jax.tree.map(lambda x: self._rows if x.ndim else self._whole, jax.eval_shape(self._init))

    def batches(self, start_step):
        for step in range(start_step, self._num_batches):
            yield {"x_BD": np.random.default_rng(step).normal(size=(4, 8)).astype(np.float32)}

    def train_step(self, state, batch, step):
        time.sleep(self._step_s)
        self._on_step(step)
        x_BD = batch["x_BD"] * (np.nan if step in self._bad_steps else 1)
        return self._update(state, x_BD, np.int32(step))

    def flops_of_step(self, step):
        return 1e6

    def evaluate(self, state):
        self.evaluated_steps.append(int(state.step))
        return {"loss": float(jnp.sum(state.ema["kernel_DD"] ** 2))}

    def pictures(self, state):
        kernel_DD = multihost_utils.process_allgather(state.params["kernel_DD"], tiled=True)
        return {"weights": kernel_DD[..., None].repeat(3, -1).astype(np.uint8)}


def make_settings(num_steps, **changes):
    intervals = dict(log_every_steps=2, eval_every_steps=5, picture_every_steps=0, save_every_steps=4)
    return LoopSettings(**(dict(num_steps=num_steps, keep_checkpoints=2, max_bad_steps=3) | intervals | changes))


if __name__ == "__main__":
    logging._open_summary_writer = lambda folder: NoWriter()

    failing, failing_step, kind = os.environ.get("TOY_FAIL", "0:never:").split(":")
    failures = {
        "input": InputError("201 bad images, but data.max_bad_share=0.01 allows 200", field="bad images"),
        "disk": OSError(errno.ENOSPC, "No space left on device", "runs/toy/metrics.jsonl"),
        "bug": ZeroDivisionError("by zero"),
    }

    def fail_at(moment):
        if (jax.process_index(), str(moment)) == (int(failing), failing_step):
            raise failures[kind]

    def on_step(step):
        print("step", step, flush=True)
        fail_at(step)

    def read_slowly(path):
        time.sleep(3 * jax.process_index())
        return read_lines(path)

    if "slow" in sys.argv:
        logging.read_lines = read_slowly

    def train():
        fail_at("start")
        task = ToyTask(float(sys.argv[3]), on_step=on_step, is_sharded="sharded" in sys.argv)
        result = run(task, sys.argv[1], make_settings(int(sys.argv[2])), {"lr": 0.01})
        print("result", result.step, result.interrupted, flush=True)
        return 0

    if "own" in sys.argv:
        address, count, index = sys.argv[4].split(",")
        jax.distributed.initialize(address, int(count), int(index))
        sys.exit(train())
    sys.exit(run_together(train, *sys.argv[4:5]))
