"""Kernels that a compiled sampler launches on a GPU, and the bytes that they read and write.

    python benchmarks/launches.py --target h100 --depth 16 --batch 32    # no device needed, but jax[cuda12]

XLA's own figures count a loop's body once and custom kernels as nothing. This counts in the compiled text: the body
times its trip count, and for each kernel its operands and results once. A fusion that only slices, gathers or updates
part of an operand counts that part.
"""

import argparse
import collections
import functools
import re
import sys
from pathlib import Path

import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import compile_sampler, make_modules

from mvar_jax.errors import InputError
from mvar_jax.hardware.program_text import Kernel, kernels_of
from mvar_jax.scales import KNOWN_SIDES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100", help="a GPU that need not be here")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, choices=sorted(KNOWN_SIDES), help="image side")
    parser.add_argument("--batch", type=int, default=32, help="images; guidance doubles the rows")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the computation")
    parser.add_argument("--output", default="pixels", help="pixels, or ids without the decoder")
    parser.add_argument("--backend", default="auto", help="backend of the local window")
    parser.add_argument("--top", type=int, default=15, help="kernels to list, by bytes and by launches")
    parser.add_argument("--text", type=Path, help="count in this compiled text, or write it if the file is missing")
    args = parser.parse_args(argv)
    if args.text is not None and args.text.exists():
        text = args.text.read_text()
    else:
        try:
            dtype = jnp.dtype(args.dtype)
            modules = make_modules(args, "markov")
            text = compile_sampler(args.target, modules, args.batch, dtype, (args.output,)).text
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if args.text is not None:
            args.text.write_text(text)
    report(kernels_of(text), args.top)
    return 0


def report(kernels: list[Kernel], num_listed: int) -> None:
    """Print the sums, and the kernels with the same origin that launch and move most."""
    launches, num_bytes = collections.Counter(), collections.Counter()
    for kernel in kernels:
        name = re.sub(r"\d+", "#", kernel.name)[-80:]
        launches[name] += kernel.launches
        num_bytes[name] += kernel.num_bytes
    total = functools.reduce(lambda a, b: a + b, num_bytes.values(), 0)
    print(f"{sum(launches.values())} kernels launched, {total / 1e9:.2f} GB read and written")
    for title, counts in (("launches", launches), ("bytes", num_bytes)):
        print(f"\n| origin | launches | GB | most {title} first\n| --- | --- | --- |")
        for name, _ in counts.most_common(num_listed):
            print(f"| {name} | {launches[name]} | {num_bytes[name] / 1e9:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
