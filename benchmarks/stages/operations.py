"""Stages of single operations in jax: parity with an oracle, time of window attention as a loop on the device."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stages.measure import TINY, compile_all, jax_conditions, time_rounds, why
from benchmarks.stages.report import CONDITIONS, Report, median
from benchmarks.window_cases import CASES, TIMED_MAPS, Case, benchmark_case
from mvar_jax.hardware.compiling import MIB
from mvar_jax.ops import draw_gpu
from mvar_jax.ops.attention import block_diagonal_mask, dense_attention, head_scale, normalise_query_key
from mvar_jax.ops.block_diagonal import Segments, block_diagonal_attention
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.products import add_bias
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.ops.sampling import draw, filter_logits
from mvar_jax.ops.triton_attention import attend_raw
from mvar_jax.ops.window import BACKENDS, local_window_attention, why_not
from mvar_jax.ops.window.geometry import window_mask
from mvar_jax.ops.window.pallas_gpu import rule_of
from mvar_jax.scales import KNOWN_SIDES, areas_of

LIMITS = {"float32": 2e-5, "bfloat16": 1.2e-2}  # |ours - oracle| / |oracle|, norms
MAX_NEAR_TIES = 1e-3  # of all draws: top-p keeps a logit or not by the rounding of a sum
FILTERS = ((0, 0.0), (8, 0.0), (0, 0.9), (1200, 0.99))  # top_k, top_p
PARITY_SIDES = (13, 16, 24, 32)
NUM_CALLS = 50  # in one timed program
DIRECTIONS = {"forward": 4, "with gradients": 12}  # arrays that a call reads or writes at least


def timed_cases(args) -> list[Case]:
    """Return the shapes that `attention` and `torch` time: heads of d16 in bfloat16, maps of the sides --maps."""
    if args.size == TINY:
        return [Case(5, 5, 3, 2, 16, batch=2, dtype="bfloat16")]
    return [benchmark_case(side, TIMED_MAPS[side], "bfloat16") for side in args.maps]


def parity_cases(args) -> list[Case]:
    if args.size == TINY:
        return [CASES[0], Case(5, 5, 3, 2, 16, dtype="bfloat16")]
    return [*CASES, *(benchmark_case(side, 2, dtype) for side in PARITY_SIDES for dtype in LIMITS)]


def arrays_of(case: Case) -> list[jax.Array]:
    """Return q, k, v and a cotangent of normal numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, case.shape, jnp.float32).astype(case.dtype) for key in keys]


@dataclasses.dataclass(frozen=True)
class Subject:
    """Arrays (q, k, v and a cotangent) and functions of q, k, v by name that must agree with "reference"."""

    name: str
    arrays: list[jax.Array]
    forms: dict[str, Callable]

    def exact(self) -> list[jax.Array]:
        return [x.astype(jnp.float32) for x in self.arrays]


def window_forms(case: Case, q: jax.Array) -> dict[str, Callable]:
    """Return the backends that support q here.

    `gather` is left out in bfloat16: its gradients are a scatter-add of up to window**2 numbers, which XLA may add up
    in bfloat16. That error is the form's own and exceeds the limit for kernels.
    """
    options = {"window": case.window, "scale": case.head_width**-0.5}
    attend = functools.partial(local_window_attention, **options)
    left_out = {"gather"} if q.dtype == jnp.bfloat16 else set()
    names = [name for name in BACKENDS if name not in left_out and not why_not(name, q)]
    return {name: functools.partial(attend, backend=name) for name in names}


def subjects(args) -> list[Subject]:
    """Return window attention by every backend, and attention within the coarse scales, trained in one phase.

    Both also by the kernels that read the raw product of queries, keys and values.
    """
    found = []
    for case in parity_cases(args):
        arrays = arrays_of(case)
        found.append(Subject(str(case), arrays, window_forms(case, arrays[0])))
    areas = areas_of((1, 2) if args.size == TINY else KNOWN_SIDES[256][:8])
    masked = functools.partial(dense_attention, mask_NM=block_diagonal_mask(areas), scale=0.125)
    here = functools.partial(block_diagonal_attention, areas=areas, scale=0.125)
    for dtype in LIMITS:
        arrays = [x.reshape(2, -1, *x.shape[3:]) for x in arrays_of(Case(1, sum(areas), 1, 16, 64, 2, dtype))]
        found.append(Subject(f"{len(areas)} scales, {dtype}", arrays, {"reference": masked, "auto": here}))
    side, window = (3, 3) if args.size == TINY else (16, 7)
    rules = (
        (Segments(areas), block_diagonal_mask(areas)),
        (rule_of(side, side, window), window_mask(side, side, window)),
    )
    return found + [raw_subject(rule, mask, dtype) for rule, mask in rules for dtype in LIMITS]


def raw_subject(rule, mask: np.ndarray, dtype: str) -> Subject:
    """Return attention from the raw product by the Triton kernels; in Pallas's interpreter if this is no GPU."""
    arrays = [x.reshape(2, -1, *x.shape[3:]) for x in arrays_of(Case(1, rule.num_tokens, 1, 16, 64, 2, dtype))]
    q_bias, v_bias = jax.random.normal(jax.random.key(1), (2, *arrays[0].shape[2:]))
    log_scale = jnp.linspace(-1.0, 3.0, len(q_bias))

    def by_layers(q, k, v):
        q, k = normalise_query_key(add_bias(q, q_bias), k, log_scale)
        return dense_attention(q, k, add_bias(v, v_bias), mask)

    def by_kernels(q, k, v):
        product, scale = jnp.stack([q, k, v], axis=2), head_scale(log_scale)
        return attend_raw(rule, product, q_bias, v_bias, scale, interpret=current_platform() != "gpu")

    name = f"raw product, {type(rule).__name__.lower()} of {rule.num_tokens}, {dtype}"
    return Subject(name, arrays, {"reference": by_layers, "kernels": by_kernels})


def with_gradients(attend: Callable, q, k, v, cotangent):
    """Return the output and all three gradients."""
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)


def lower(fn, arrays):
    # float32 means float32: XLA's forms would round to TF32. Set here, because it holds for one thread only
    precision = "highest" if arrays[-1].dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return jax.jit(fn).lower(*arrays)


def run_kernels(args, report: Report) -> bool:
    """Compare every form that runs here with its reference in float32; return whether all keep their limits.

    Each runs twice, because a difference between two runs is a race. The reference gets the same rounded inputs.
    """
    report.add(CONDITIONS, **jax_conditions())
    all_subjects, lowers = subjects(args), {}
    for subject in all_subjects:
        for name, attend in subject.forms.items():
            arrays = subject.exact() if name == "reference" else subject.arrays
            lowers[subject.name, name] = functools.partial(lower, functools.partial(with_gradients, attend), arrays)
    programs, _ = compile_all(lowers)
    is_good = True
    for subject in all_subjects:
        for form in subject.forms.keys() - {"reference"}:
            cells = {"case": subject.name, "form": form}
            try:
                reference = outputs_of(programs[subject.name, "reference"], subject.exact())
                errors, is_same = compare(programs[subject.name, form], subject.arrays, reference)
            except Exception as error:  # a form's own failure is a row
                report.add("kernels that failed", **cells, reason=why(error))
                is_good = False
                continue
            is_ok = all(x <= LIMITS[str(subject.arrays[0].dtype)] for x in errors)  # NaN is not ok
            named = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
            report.add("relative error", **cells, **named, ok=is_ok, repeats="yes" if is_same else "no")
            is_good &= is_ok
    try:
        return add_draws(args, report) and is_good
    except Exception as error:  # the rows before it count
        report.add("kernels that failed", case="filters and draw", form="kernel", reason=why(error))
        return False


def add_draws(args, report: Report) -> bool:
    """Compare the kernel of filters and draw with XLA's; return whether all but near ties are equal."""
    B, N, V = (2, 3, 16) if args.size == TINY else (32, 256, 4096)
    logits, keys = 3 * jax.random.normal(jax.random.key(0), (B, N, V)), keys_of_samples(0, np.arange(B))
    is_kernel = draw_gpu.why_not(logits, keys) is None
    is_good = True
    for top_k, top_p in FILTERS:
        # the interpreter is for dry runs
        kernel = draw_gpu.Kernel(top_k, top_p, interpret=not is_kernel)
        (ids,) = draw_gpu.draw_filtered(kernel, logits, keys)
        expected = jax.jit(lambda x, keys, k=top_k, p=top_p: draw(filter_logits(x, k, p), keys))(logits, keys)
        num_different = int((ids != expected).sum())
        is_ok = num_different <= MAX_NEAR_TIES * B * N
        cells = {"codes": V, "top_k": top_k, "top_p": top_p, "draws": B * N, "that differ": num_different}
        report.add("filters and draw", **cells, ok=is_ok)
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


def looped(attend: Callable, direction: str, num: int):
    """Return a program of `num` calls: the output is the next q, q the next k and k the next v, so that no call can
    leave the loop. XLA knows their number, so nothing goes to the host between two calls."""

    def run(q, k, v, cotangent):
        def call(_, carry):
            q, k, v = carry[:3]
            out, *gradients = with_gradients(attend, q, k, v, cotangent)
            return (out, q, k, *(gradients if len(carry) > 3 else ()))

        return jax.lax.fori_loop(0, num, call, (q, k, v, q, k, v) if direction != "forward" else (q, k, v))

    return run


def run_attention(args, report: Report) -> bool:
    """Time each backend as a loop on the device, forward and with all gradients."""
    report.add(CONDITIONS, **jax_conditions())
    num = 2 if args.size == TINY else NUM_CALLS
    is_good = True
    for case in timed_cases(args):
        arrays, slow = arrays_of(case), {"reference", "gather"} | ({"dense", "band"} if case.height == 64 else set())
        forms = {name: form for name, form in window_forms(case, arrays[0]).items() if name not in slow}
        pairs = {(name, d): looped(form, d, num) for name, form in forms.items() for d in DIRECTIONS}
        lowers = {pair: functools.partial(lower, program, arrays) for pair, program in pairs.items()}
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
