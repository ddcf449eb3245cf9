"""Overhead of the training loop over the steps themselves, as ratios within one run on this machine.

python benchmarks/training.py             all measurements, some minutes on two CPU cores
python benchmarks/training.py loop saving only these

loop      steps/s of the loop over those of the bare compiled step, synthetic ids
saving    step time with one asynchronous save per 50 steps over that without
resume    start-up of a resumed `train` over that of the first run, with an empty and with a filled program cache
compile   lowering and compiling a 24-layer step with scan and rematerialisation over the unrolled one
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.data.pipeline import DEFAULT_LOADING
from mvar_jax.data.protocols import TokenSource
from mvar_jax.models.init import abstract_params
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.sharding import make_mesh
from mvar_jax.training import loop
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.task import RunOptions, TaskData
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, train_step
from mvar_jax.training.transformer_task import TransformerTask

SIDES = (1, 2, 3, 5, 8)


class RandomIds(TokenSource):
    """A source of random pyramids."""

    label_names = tuple("0123456789")

    def __init__(self):
        num_tokens = sum(side * side for side in SIDES)
        self._ids = np.random.default_rng(0).integers(0, 128, (256, num_tokens)).astype(np.int32)

    def __len__(self):
        return len(self._ids)

    def name_of(self, index):
        return f"record {index}"

    def read(self, numbers_B, seed, index_B):
        return self._ids[numbers_B], (numbers_B % 10).astype(np.int32)


def make_task() -> TransformerTask:
    """Return the task of the quickstart's transformer with the joint schedule."""
    tokenizer = Tokenizer(SIDES, vocab_size=128, code_width=16, ch=16, ch_mult=(1,), num_groups=None, group_size=4)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.meta.unbox(abstract_params(tokenizer)))
    model = Transformer(SIDES, 3, (3, 5), 128, 16, 10, depth=4, width=96, num_heads=3, remat="none")
    run = RunOptions(0, 1000, 32, OptimizerOptions(ema_decay=0.99), make_mesh())
    data = TaskData({"train": RandomIds(), "val": RandomIds()}, None, DEFAULT_LOADING)
    return TransformerTask(run, model, PhaseOptions(schedule="joint"), Networks(tokenizer, params), data)


class Quiet(TransformerTask):
    """The task without evaluation and image grids: steps alone."""

    def evaluate(self, state):
        self.first_s = time.perf_counter()
        return {"loss": 0.0}

    def pictures(self, state):
        self.last_s = time.perf_counter()
        return {}


def time_bare_steps(task, num_steps: int) -> float:
    """Return the seconds per step, with batches already on the host and metrics read two steps later."""
    state, batches = task.init_state(), task.batches(0)
    ready = [next(batches) for _ in range(8)]
    state, metrics = task.train_step(state, ready[0], 0)
    jax.block_until_ready(state)
    before_s, pending = time.perf_counter(), []
    for step in range(1, num_steps):
        state, metrics = task.train_step(state, ready[step % 8], step)
        pending.append(metrics["is_bad"])
        if len(pending) > 2:
            bool(pending.pop(0))
    jax.block_until_ready(state)
    return (time.perf_counter() - before_s) / (num_steps - 1)


def time_loop(task, num_steps: int, save_every_steps: int) -> float:
    """Return the seconds per step of the loop, from its second step to its last, without the final save."""
    task.__class__, stamps = Quiet, []
    bare = task.train_step

    def stamped(state, batch, step):
        stamps.append(time.perf_counter())
        return bare(state, batch, step)

    task.train_step = stamped
    settings = loop.LoopSettings(num_steps, 20, 0, 0, save_every_steps, 1, 10)
    with tempfile.TemporaryDirectory() as folder:
        loop.run(task, folder, settings, {})
    del task.train_step
    return (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def measure_loop(rounds: int = 8, num_steps: int = 50) -> None:
    task = make_task()
    time_bare_steps(task, 3)  # compiles
    time_loop(task, 3, 0)  # imports the metric writers
    steps = {"bare": lambda: time_bare_steps(task, num_steps), "loop": lambda: time_loop(task, num_steps, 0)}
    ratio = median_ratio(steps, rounds)
    print(f"loop over bare step, steps/s: {ratio:.3f}", flush=True)


def measure_saving(rounds: int = 4, num_steps: int = 100) -> None:
    task = make_task()
    time_loop(task, 3, 0)  # compiles and imports
    steps = {
        name: functools.partial(time_loop, task, num_steps, every) for name, every in (("saves", 50), ("none", 0))
    }
    ratio = median_ratio(steps, rounds)
    print(f"saving every 50 steps, added to the step time: {100 * (ratio - 1):.1f}%", flush=True)


def median_ratio(steps: dict, rounds: int) -> float:
    """Return the median over rounds of first over second; the machine's speed may change between rounds."""
    ratios = []
    for _ in range(rounds):
        times = {name: measure() for name, measure in steps.items()}
        print(", ".join(f"{name} {1000 * seconds:.1f} ms a step" for name, seconds in times.items()))
        first, second = times.values()
        ratios.append(first / second)
    return statistics.median(ratios)


def measure_resume() -> None:
    """Measure the seconds from the start of the command to the log line of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            programs = [f"{folder}/programs"] * 2 if cache == "filled" else [f"{folder}/one", f"{folder}/two"]
            if cache == "filled":
                time_first_step(f"{folder}/filling", programs[0])
            cold_s, resumed_s = (time_first_step(f"{folder}/{cache}", path) for path in programs)
            print(f"{cache} program cache, first step: cold after {cold_s:.1f} s, resumed after {resumed_s:.1f} s")
            print(f"resumed over cold, {cache} program cache: {resumed_s / cold_s:.2f}", flush=True)


def time_first_step(workdir: str, programs: str) -> float:
    """Start or resume a run, and terminate it as a preemption does once it has logged a few steps."""
    command = [sys.executable, "-m", "mvar_jax", "train", "--workdir", workdir, "--config", "configs/debug.py"]
    command += ["--config.num_steps=100000", "--config.eval_every_steps=0", "--config.save_every_steps=0"]
    command += ["--compilation_cache", programs]
    num_before = count_steps(workdir)
    before_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and count_steps(workdir) <= num_before:
        if time.perf_counter() - before_s > 600:
            process.kill()
        time.sleep(0.02)
    seconds = time.perf_counter() - before_s
    time.sleep(1)
    process.terminate()
    if process.wait(timeout=120):
        raise RuntimeError(f"training failed: {' '.join(command)}")
    return seconds


def count_steps(workdir: str) -> int:
    metrics = Path(workdir) / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def time_compilation(model: Transformer) -> float:
    """Return the seconds to lower and compile a step of the coarse phase."""
    optimizer, phases = OptimizerOptions(), model.phases()[:1]
    embed = lambda ids_BL: jnp.sin(ids_BL[:, 1:, None] * jnp.arange(16.0))
    init = lambda: make_state(lambda: model.init_params(jax.random.key(0)), optimizer)
    state = jax.eval_shape(lambda: nn.meta.unbox(init()))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    batch = {"ids": shape(4, model.pyramid.num_tokens), "label": shape(4), "index": shape(4)}
    recipe = TransformerRecipe(model, optimizer, PhaseOptions())
    step = lambda state, batch: train_step(
        recipe, phases, state, {**batch, "previous": embed(batch["ids"])}, 0.01, 0.05
    )
    before_s = time.perf_counter()
    jax.jit(step).lower(state, batch).compile()
    return time.perf_counter() - before_s


def measure_compile(depth: int = 24, width: int = 96) -> None:
    """Compare compile times of a narrow 24-layer model, which has as many operations as d24, only smaller."""
    seconds = {}
    for name, changes in (("scan", {"remat": "dots"}), ("unrolled", {"remat": "none", "scan_unroll": depth})):
        model = Transformer(SIDES, 3, (3, 5), 128, 16, 10, depth=depth, width=width, num_heads=3, **changes)
        seconds[name] = time_compilation(model)
        print(f"{depth} layers, {name}: lowered and compiled in {seconds[name]:.1f} s", flush=True)
    print(f"scan over unrolled: {seconds['scan'] / seconds['unrolled']:.2f}")


MEASUREMENTS = {
    "loop": measure_loop,
    "saving": measure_saving,
    "resume": measure_resume,
    "compile": measure_compile,
}


def main(names: list[str]) -> None:
    chosen = [MEASUREMENTS[name] for name in names or MEASUREMENTS]
    print(json.dumps({"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}))
    for measure in chosen:
        measure()


if __name__ == "__main__":
    main(sys.argv[1:])
