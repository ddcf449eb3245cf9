"""Training steps and sampling of two checkouts, in turns within one run: seconds of each and their ratio.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py --before ../before    some five minutes on two cores

float32, random weights and tokens, layers of d16's width. A cycle is the paper's: 8 steps of the coarse scales, one
of each finer scale. Sampling goes from labels to tokens, with guidance and both filters. A round runs the checkouts
one after the other, the second round in the other order.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COARSE_STEPS = 8


def make_programs(args) -> dict:
    """Return name -> a function without arguments that runs one compiled program of the checkout in sys.path."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from benchmarks.published_training import CLASSES, CODE_WIDTH, CODES, SIDES, make_batch, our_step
    from mvar_jax.models.networks import Networks
    from mvar_jax.models.tokenizer import Tokenizer, quantizer_params
    from mvar_jax.models.transformer import Transformer
    from mvar_jax.sampling.sampler import SampleOptions, sample

    model = Transformer(SIDES, 8, 7, CODES, CODE_WIDTH, CLASSES, args.depth, args.width, args.width // 64)
    tokenizer = Tokenizer(SIDES, ch=32)
    step = our_step(model, make_batch(args.batch_size))
    programs = {f"{phase.num_tokens} tokens": lambda phase=phase: step(phase) for phase in model.phases()}
    init = lambda module: nn.meta.unbox(jax.jit(module.init_params)(jax.random.key(0)))
    networks = Networks(tokenizer, quantizer_params(init(tokenizer)), model, init(model))
    labels, keys = jnp.arange(args.batch_size // 2), jax.random.split(jax.random.key(1), args.batch_size // 2)
    options = SampleOptions(cfg=2.7, top_k=1200, top_p=0.99)
    programs["sampling"] = lambda: jax.block_until_ready(sample(networks, labels, keys, options))
    return programs


def serve(args) -> None:
    """Run the programs that stdin names, one a line; print the names first, then the seconds of each."""
    sys.path.insert(0, args.serve)
    programs = make_programs(args)
    print("\t".join(programs), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        programs[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


@contextlib.contextmanager
def start(checkout: Path, argv: list[str]):
    """Start a process that serves a checkout; yield (its names of programs, a function that times one)."""
    command = [sys.executable, __file__, "--serve", str(checkout.resolve()), *argv]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def ask(name: str) -> float:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield process.stdout.readline().strip().split("\t"), ask
        process.stdin.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout to compare this one with")
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64 (default 1024)")
    parser.add_argument("--batch_size", type=int, default=8, help="of a step; sampling has half of it (default 8)")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each program, after a first one")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.serve:
        serve(args)
        return 0
    if args.before is None or not (args.before / "mvar_jax").is_dir():
        print(f"error: --before must be a checkout of this repository, got {args.before}", file=sys.stderr)
        return 2
    sizes = [f"--{name}={getattr(args, name)}" for name in ("depth", "width", "batch_size")]
    with start(args.before, sizes) as before, start(ROOT, sizes) as after:
        print_table(before[0], {"before": before[1], "after": after[1]}, args.rounds)
    return 0


def print_table(names: list[str], sides: dict, rounds: int) -> None:
    """Time each program in turns and print medians in seconds, and how many times as fast `after` is."""
    print(f"{processor()}, {os.cpu_count()} cores")
    print("| program | before, s | after, s | times as fast | in single rounds |\n| --- | --- | --- | --- | --- |")
    cycle = dict.fromkeys(sides, 0.0)
    for number, name in enumerate(names):
        times: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(rounds + 1):
            for side in list(sides) if i % 2 else reversed(sides):
                times[side].append(sides[side](name))
        medians = {side: statistics.median(seconds[1:]) for side, seconds in times.items()}
        if name != "sampling":
            cycle = {side: cycle[side] + medians[side] * (COARSE_STEPS if number == 0 else 1) for side in sides}
        single = [f"{b / a:.2f}" for b, a in zip(times["before"][1:], times["after"][1:], strict=True)]
        print_row(name, medians, ", ".join(single))
    print_row(f"a cycle of {COARSE_STEPS} + {len(names) - 2} steps", cycle, "")


def print_row(name: str, seconds: dict[str, float], note: str) -> None:
    ratio = seconds["before"] / seconds["after"]
    print(f"| {name} | {seconds['before']:.2f} | {seconds['after']:.2f} | {ratio:.2f} | {note} |", flush=True)


def processor() -> str:
    """Return the name of the processor, and whether it has AVX-512, on which products depend most."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    return f"{name} with{'' if 'avx512f' in text else 'out'} AVX-512"


if __name__ == "__main__":
    sys.exit(main())
