"""Stages of the whole model in jax, random weights: sampling from labels and steps of training."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import OPTIONS, params_of, shapes_like
from benchmarks.stages.measure import (
    compile_all,
    compiled_mib,
    fill,
    jax_conditions,
    modules_of,
    time_rounds,
    why,
)
from benchmarks.stages.report import CONDITIONS, Report, median
from mvar_jax.hardware.machines import peak_flops
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import quantizer_params
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import phase_macs
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.sampler import sample
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, train_step
from mvar_jax.training.transformer_task import with_input

OUTPUTS = {"tokens": ("ids", "f_hat"), "pixels": ("pixels",)}
COARSE_STEPS = 8  # of a cycle, as the paper trains; each other phase gets one


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage: what a row says of it, how to lower it and how to call the compiled one.

    flops: of the model in one call, forward and backward, None if they are not reported.
    """

    cells: dict[str, Any]
    batch: int
    lower: Callable
    call: Callable
    flops: float | None = None


def sampler_programs(args, batches: list[int], what: list[str]) -> dict[str, Program]:
    """Return sampling with guidance and both filters, weights in bfloat16, for each batch and output."""
    tokenizer, transformer = modules_of(args)
    params, tokenizer_params = fill(params_of(transformer, jnp.dtype("bfloat16"))), fill(params_of(tokenizer))
    programs = {}
    for batch in batches:
        labels, keys = jnp.arange(batch) % transformer.num_classes, keys_of_samples(0, np.arange(batch))
        for name in what:
            weights = tokenizer_params if name == "pixels" else quantizer_params(tokenizer_params)
            arguments = (Networks(tokenizer, weights, transformer, params), labels, keys)
            programs[f"sampling, batch {batch}, {name}"] = Program(
                {"batch": batch, "what": name},
                batch,
                functools.partial(sample.lower, *arguments, OPTIONS, OUTPUTS[name]),
                lambda program, arguments=arguments: program(*arguments),
            )
    return programs


def training_programs(args, batches: list[int]) -> dict[str, Program]:
    """Return a step of each phase, batch and pair of --loops: float32 weights, AdamW without moving average."""
    tokenizer, base = modules_of(args)
    options = OptimizerOptions(ema_decay=0.0)
    transformers = [base.clone(remat=remat, scan_unroll=blocks) for remat, blocks in args.loops]
    shapes = shapes_like(lambda: make_state(lambda: base.init_params(jax.random.key(0)), options))
    networks = Networks(tokenizer, quantizer_params(fill(params_of(tokenizer))))
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    # every program donates the state and puts the next one back
    held = [shapes.replace(step=zeros(shapes.step), params=fill(shapes.params), opt_state=zeros(shapes.opt_state))]

    def step(recipe, phase, state, batch, networks, rate, decay):
        return train_step(recipe, (phase,), state, with_input(networks, batch), rate, decay)

    def call(inputs, program):
        held[0], metrics = program(held[0], *inputs)
        return metrics["loss"]

    programs, rng = {}, np.random.default_rng(0)
    sizes = (base.depth, base.width, base.vocab_size, base.code_width)
    for batch in batches:
        ids = rng.integers(0, base.vocab_size, (batch, base.pyramid.num_tokens))
        labels = rng.integers(0, base.num_classes, batch)
        rows = {"ids": jnp.asarray(ids, jnp.int32), "label": jnp.asarray(labels, jnp.int32)}
        rows["index"] = jnp.arange(batch, dtype=jnp.int32)
        inputs = (rows, networks, jnp.float32(1e-5), jnp.float32(0.05))
        for transformer, phase in itertools.product(transformers, base.phases()):
            recipe = TransformerRecipe(transformer, options, PhaseOptions(ratio=COARSE_STEPS))
            jitted = jax.jit(functools.partial(step, recipe, phase), donate_argnums=0)
            cells = {"batch": batch, "loop": loop_name(transformer), "tokens": phase.num_tokens}
            programs[f"training, batch {batch}, {cells['loop']}, {phase.num_tokens} tokens"] = Program(
                cells,
                batch,
                functools.partial(jitted.lower, shapes, *inputs),
                functools.partial(call, inputs),
                6.0 * batch * phase_macs(base.pyramid, phase, *sizes),
            )
    return programs


def loop_name(transformer: Transformer) -> str:
    return f"remat {transformer.remat}, {transformer.scan_unroll} of {transformer.depth} blocks"


def measure_programs(table: str, programs: dict[str, Program], rounds: int, report: Report) -> dict[str, list[float]]:
    """Compile all programs, time each and add its row. Return the milliseconds of the programs that ran.

    The smallest runs first: if a large one does not fit, the others have their rows. Memory is the compiler's figure,
    since the peak of this process is that of XLA trying convolutions; planned.py measures the peak of a program.
    """
    compiled, seconds = compile_all({name: program.lower for name, program in programs.items()})
    limit, times = peak_flops(jax.devices()[0].device_kind), {}
    memory = {name: 0.0 if isinstance(x, Exception) else compiled_mib(x) for name, x in compiled.items()}
    for name in sorted(memory, key=memory.__getitem__):
        program, built = programs[name], compiled[name]
        try:
            if isinstance(built, Exception):
                raise built
            times[name] = time_rounds(functools.partial(program.call, built), rounds)
        except Exception as error:  # out of memory, or it does not compile: the others go on
            report.add(f"{table} that failed", **program.cells, reason=why(error))
            continue
        ms = median(times[name])
        cells = {**program.cells, "ms": times[name], "images/s": 1e3 * program.batch / ms}
        if program.flops is not None:
            cells["MFU"] = 1e3 * program.flops / ms / limit if limit else None
        cells |= {"compiled, MiB": memory[name], "compiling, s": seconds[name]}
        report.add(table, **cells)
    return times


def run_sampler(args, report: Report) -> bool:
    """Time sampling to tokens and to pixels at each batch of --batches; return whether all ran."""
    report.add(CONDITIONS, **jax_conditions())
    programs = sampler_programs(args, args.batches, list(OUTPUTS))
    return len(measure_programs(f"sampling, d{args.depth}, {args.size}", programs, args.rounds, report)) == len(
        programs
    )


def run_training(args, report: Report) -> bool:
    """Time a step of each phase, batch and pair of --loops, and the cycle; return whether all ran."""
    report.add(CONDITIONS, **jax_conditions())
    programs = training_programs(args, args.train_batches)
    times = measure_programs(f"training, d{args.depth}, {args.size}", programs, args.rounds, report)
    cycles = collections.defaultdict(list)
    for name, program in programs.items():
        cycles[program.batch, program.cells["loop"]].append(name)
    for (batch, loop), names in cycles.items():
        if all(name in times for name in names):
            add_cycle(batch, loop, [median(times[name]) for name in names], report)
    return len(times) == len(programs)


def add_cycle(batch: int, loop: str, ms: list[float], report: Report) -> None:
    """Add the paper's cycle, from the milliseconds of a step of each phase."""
    coarse, *others = ms
    seconds, steps = (COARSE_STEPS * coarse + sum(others)) / 1e3, COARSE_STEPS + len(others)
    cells = {"batch": batch, "loop": loop, "steps": f"{COARSE_STEPS} + {len(others)}", "s": seconds}
    report.add("a cycle of training", **cells, **{"images/s": batch * steps / seconds})
