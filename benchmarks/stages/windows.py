"""Stages of the window attention in jax: parity of every backend with the oracle, time of a loop on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stages.measure import TINY, compile_all, jax_conditions, time_rounds, why
from benchmarks.stages.report import CONDITIONS, Report, median
from benchmarks.window_cases import CASES, Case, benchmark_case
from mvar_jax.hardware.compiling import MIB
from mvar_jax.ops.window import BACKENDS, local_window_attention, why_not

LIMITS = {"float32": 2e-5, "bfloat16": 1.2e-2}  # |ours - oracle| / |oracle|, norms
PARITY_SIDES = (13, 16, 24, 32)
NUM_CALLS = 50  # in one timed program
DIRECTIONS = {"forward": 4, "with gradients": 12}  # arrays that a call reads or writes at least


def timed_cases(args) -> list[Case]:
    """Return the shapes that `attention` and `torch` time: heads of d16 at batch 64, in bfloat16."""
    if args.size == TINY:
        return [Case(5, 5, 3, 2, 16, batch=2, dtype="bfloat16")]
    return [benchmark_case(side, batch, "bfloat16") for side, batch in ((13, 64), (16, 64), (32, 64), (64, 16))]


def parity_cases(args) -> list[Case]:
    if args.size == TINY:
        return [CASES[0], Case(5, 5, 3, 2, 16, dtype="bfloat16")]
    return [*CASES, *(benchmark_case(side, 2, dtype) for side in PARITY_SIDES for dtype in LIMITS)]


def arrays_of(case: Case) -> list[jax.Array]:
    """Return q, k, v and a cotangent of normal numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, case.shape, jnp.float32).astype(case.dtype) for key in keys]


def with_gradients(backend: str, case: Case, q, k, v, cotangent):
    """Return the output and all three gradients."""
    attend = lambda q, k, v: local_window_attention(
        q, k, v, case.window, scale=case.head_width**-0.5, backend=backend
    )
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)


def lower(fn, arrays):
    # float32 means float32: XLA's forms would round to TF32. Set here, because it holds for one thread only
    precision = "highest" if arrays[-1].dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return jax.jit(fn).lower(*arrays)


def run_kernels(args, report: Report) -> bool:
    """Compare every backend that runs here with `reference` in float32; return whether all keep their limits.

    Each runs twice, because a difference between two runs is a race. The oracle gets the same rounded inputs.
    """
    report.add(CONDITIONS, **jax_conditions())
    arrays, lowers = {case: arrays_of(case) for case in parity_cases(args)}, {}
    exact = {case: [x.astype(jnp.float32) for x in arrays[case]] for case in arrays}
    for case in arrays:
        for name in BACKENDS:
            inputs = exact[case] if name == "reference" else arrays[case]
            if not why_not(name, inputs[0]):
                lowers[case, name] = functools.partial(lower, functools.partial(with_gradients, name, case), inputs)
    programs, _ = compile_all(lowers)
    is_good = True
    for case in arrays:
        for name in (name for other, name in programs if other == case and name != "reference"):
            cells = {"map": str(case), "backend": name}
            try:
                oracle = outputs_of(programs[case, "reference"], exact[case])
                errors, is_same = compare(programs[case, name], arrays[case], oracle)
            except Exception as error:  # a backend's own failure is a row
                report.add("kernels that failed", **cells, reason=why(error))
                is_good = False
                continue
            is_ok = all(x <= LIMITS[case.dtype] for x in errors)  # NaN is not ok
            named = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
            report.add("relative error", **cells, **named, ok=is_ok, repeats="yes" if is_same else "no")
            is_good &= is_ok
    return is_good


def outputs_of(program, arrays) -> list[np.ndarray]:
    """Return the outputs of a compiled program. Raises what its compilation raised."""
    if isinstance(program, Exception):
        raise program
    return [np.asarray(x, np.float64) for x in program(*arrays)]


def compare(program, arrays, oracle) -> tuple[list[float], bool]:
    """Return (relative error of each output, whether a second run is equal bit by bit)."""
    first, second = outputs_of(program, arrays), outputs_of(program, arrays)
    errors = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(first, oracle, strict=True)]
    return errors, all(bool((x == y).all()) for x, y in zip(first, second, strict=True))


def looped(backend: str, case: Case, direction: str, num: int):
    """Return a program of `num` calls: the output is the next q, q the next k and k the next v, so that no call can
    leave the loop. XLA knows their number, so nothing goes to the host between two calls."""

    def run(q, k, v, cotangent):
        def call(_, carry):
            q, k, v = carry[:3]
            out, *gradients = with_gradients(backend, case, q, k, v, cotangent)
            return (out, q, k, *(gradients if len(carry) > 3 else ()))

        return jax.lax.fori_loop(0, num, call, (q, k, v, q, k, v) if direction != "forward" else (q, k, v))

    return run


def run_attention(args, report: Report) -> bool:
    """Time each backend as a loop on the device, forward and with all gradients."""
    report.add(CONDITIONS, **jax_conditions())
    num = 2 if args.size == TINY else NUM_CALLS
    names, is_good = [name for name in ("pallas_gpu", "pallas_tpu", "dense", "band", "tiled")], True
    for case in timed_cases(args):
        arrays = arrays_of(case)
        pairs = [(name, d) for name in names if not why_not(name, arrays[0]) for d in DIRECTIONS]
        pairs = [(name, d) for name, d in pairs if case.height < 64 or name in ("pallas_gpu", "tiled")]
        lowers = {pair: functools.partial(lower, looped(pair[0], case, pair[1], num), arrays) for pair in pairs}
        programs, _ = compile_all(lowers)
        for (name, direction), program in programs.items():
            cells = {"map": f"{case.height}x{case.width}", "batch": case.batch, "backend": name}
            try:
                if isinstance(program, Exception):
                    raise program
                times = [t / num for t in time_rounds(functools.partial(program, *arrays), args.rounds)]
            except Exception as error:  # a backend's own failure is a row
                report.add("attention that failed", **cells, direction=direction, reason=why(error))
                is_good = False
                continue
            gigabytes = DIRECTIONS[direction] * np.prod(case.shape) * 2 / 1e9
            temp = program.memory_analysis().temp_size_in_bytes / MIB
            rate = float(gigabytes / median(times) * 1e3)
            row = {"ms": times, "GB/s of least traffic": rate, "temporaries, MiB": temp}
            report.add("window attention, bfloat16, a call", **cells, direction=direction, **row)
    return is_good
