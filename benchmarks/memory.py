"""Memory of the published sizes by XLA's own figures: sampling, training (Markov and VAR view), the tokenizer's.

    python benchmarks/memory.py --target h100 --depth 16 --out out    # no device needed, but jax[cuda12]
    python benchmarks/memory.py --target h100 --parts tokenizer --batch 8

The total is everything on the device: arguments (weights, optimizer), outputs and temporaries, donated buffers
counted once. Also prints the published programs' peak and the arithmetic of ops/cost.py, and writes memory.csv and
memory.png.
"""

import argparse
import csv
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB, Compiled, compile_for, devices_of
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer, quantizer_params
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import attention_macs, forward_macs, kv_cache_bytes
from mvar_jax.planning.compare import PUBLISHED_MB
from mvar_jax.planning.tasks import compile_program, make_task, programs_of
from mvar_jax.sampling.sampler import SampleOptions, decode_features, sample
from mvar_jax.scales import KNOWN_SIDES
from mvar_jax.training.programs import SAMPLE, TRAIN, Program

PARTS = {"sampling": SAMPLE, "training": TRAIN}
OPTIONS = SampleOptions(cfg=2.7, top_k=1200, top_p=0.99)
FIELDS = ("what", "view", "setting", "total_mib", "argument_mib", "temp_mib", "compile_s", "published_mb")


def make_modules(args, view: str) -> tuple[Tokenizer, Transformer]:
    """Return (tokenizer, transformer) of the published sizes at an image side."""
    depth, size, dtype = args.depth, args.size, jnp.dtype(args.dtype).type
    sides = KNOWN_SIDES[size]
    transformer = Transformer(
        sides,
        refine_step=8 if size == 256 else 7,
        kernel_size=7,
        vocab_size=4096,
        code_width=32,
        num_classes=1000,
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        conditioning=view,
        window_backend=args.backend,
        dtype=dtype,
    )
    return Tokenizer(sides, dtype=dtype), transformer


def shapes_like(make, dtype=None):
    """Return the shapes of a tree that `make` builds, its float arrays in `dtype`."""
    tree = nn.meta.unbox(jax.eval_shape(make))
    change = lambda x: dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, change(x)), tree)


def params_of(module, dtype=None):
    return shapes_like(lambda: module.init_params(jax.random.key(0)), dtype)


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def keys_like(num: int) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num))


def compile_sampler(
    target: str, modules, batch: int, dtype, outputs=("ids", "f_hat"), refiner=None, later=None, switch: int = 0
):
    """Compile sampling from labels to `outputs`: all scales, guidance, filters, draws, decoding if it is needed.

    refiner: of the transformer. later: a transformer that draws the scales from number `switch` on.
    """
    tokenizer, transformer = modules
    run = lambda networks, labels, keys: sample(networks, labels, keys, OPTIONS, outputs)
    weights = params_of(tokenizer)
    weights = weights if set(outputs) - {"ids", "f_hat"} else quantizer_params(weights)
    networks = Networks(tokenizer, weights, transformer, params_of(transformer, dtype))
    if refiner is not None:
        networks = networks.replace(refiner=refiner, refiner_params=params_of(refiner, dtype))
    if later is not None:
        networks = networks.switched(Networks(tokenizer, None, later, params_of(later, dtype)), switch)
    return compile_for(target, run, networks, array(batch), keys_like(batch))


def compile_decoder(target: str, modules, batch: int, dtype):
    tokenizer = modules[0]
    side = tokenizer.sides[-1]
    networks = Networks(tokenizer, params_of(tokenizer, dtype))
    return compile_for(target, decode_features, networks, array(batch, side, side, 32, dtype=jnp.float32))


def compile_steps(target: str, config: dict) -> Iterator[tuple[Program, Callable[[], Compiled]]]:
    """Yield (program, what compiles it) of a config's training steps, on one device of a target."""
    task = make_task(config, devices_of(target)[:1], num_images=1)
    for program in programs_of(task, 1):
        if program.part == TRAIN and program.images:
            yield program, functools.partial(compile_program, task, program, target)


def transformer_config(args, view: str, remat: str) -> dict:
    """Return the config of a published size at an image side, with the batch of the arguments."""
    model = {"depth": args.depth, "width": 64 * args.depth, "num_heads": args.depth, "dtype": args.dtype}
    model |= {"conditioning": view, "remat": remat, "window_backend": args.backend, "drop_path_rate": 0.0}
    keys = {f"model.{name}": value for name, value in model.items()} | {"batch_size": args.batch}
    name = f"imagenet{args.size}_d16"
    return read_config(name, [f"--config.{key}={value}" for key, value in keys.items()])


def tokenizer_config(args, kind: str, remat: bool) -> dict:
    """Return the config of the published tokenizer's training. kind: of the discriminator, patch or none."""
    keys = {"model.dtype": args.dtype, "model.remat": remat, "batch_size": args.batch, "adversary.kind": kind}
    return read_config("tokenizer_imagenet256", [f"--config.{key}={value}" for key, value in keys.items()])


def make_row(what: str, view: str, setting: str, depth: int, batch: int, compiling) -> dict:
    begin = time.perf_counter()
    compiled = compiling()
    row = {"what": what, "view": view, "setting": setting, "compile_s": time.perf_counter() - begin}
    row["total_mib"] = compiled.total_bytes / MIB
    row["argument_mib"], row["temp_mib"] = compiled.argument_bytes / MIB, compiled.temp_bytes / MIB
    row["published_mb"] = PUBLISHED_MB.get((view, depth, PARTS.get(what))) if batch == 32 else None
    cells = [what, view, setting, *(f"{row[name]:.0f}" for name in FIELDS[3:7]), row["published_mb"] or ""]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return row


def sampling_rows(args) -> list[dict]:
    rows = []
    for view in args.views.split(","):
        modules = make_modules(args, view)
        for dtype in ("float32", "bfloat16"):
            compiling = lambda modules=modules, dtype=dtype: compile_sampler(
                args.target, modules, args.batch, jnp.dtype(dtype)
            )
            rows.append(make_row("sampling", view, f"{dtype} weights", args.depth, args.batch, compiling))
    compiling = lambda: compile_decoder(args.target, modules, args.batch, jnp.dtype("float32"))
    rows.append(make_row("decoding", "both", "float32 weights", args.depth, args.batch, compiling))
    return rows


def training_rows(args) -> list[dict]:
    rows = []
    for view, remat in itertools.product(args.views.split(","), args.remats.split(",")):
        for program, compiling in compile_steps(args.target, transformer_config(args, view, remat)):
            setting = f"{program.name.removeprefix('step, ')}, remat {remat}"
            rows.append(make_row("training", view, setting, args.depth, args.batch, compiling))
    return rows


def tokenizer_rows(args) -> list[dict]:
    rows = []
    for kind, remat in itertools.product(("none", "patch"), (False, True)):
        setting = f"batch {args.batch}, discriminator {kind}, remat {remat}"
        *_, (_, compiling) = compile_steps(args.target, tokenizer_config(args, kind, remat))
        rows.append(make_row("tokenizer", "both", setting, args.depth, args.batch, compiling))
    return rows


def print_arithmetic(args) -> None:
    pyramid, width = make_modules(args, "markov")[1].pyramid, 64 * args.depth
    print("| view | attention G-MACs | transformer G-MACs | cache MiB, float32, with guidance |")
    print("| --- | --- | --- | --- |")
    for view in ("full", "markov"):
        macs = attention_macs(pyramid, args.depth, width, view) / 1e9
        whole = forward_macs(pyramid, args.depth, width, 4096, 32, view) / 1e9
        cache = kv_cache_bytes(pyramid, args.depth, width, 2 * args.batch, view) / MIB
        print(f"| {view} | {macs:.2f} | {whole:.2f} | {cache:.0f} |")


def draw_figure(rows: list[dict], path: Path) -> None:
    """Plot arguments and temporaries of each row, stacked, with the published peak as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1 + 0.35 * len(rows)))
    names = [f"{row['what']}, {row['view']}, {row['setting']}" for row in rows]
    arguments = [row["argument_mib"] for row in rows]
    axis.barh(names, arguments, label="arguments (weights, optimizer)")
    axis.barh(names, [row["total_mib"] - row["argument_mib"] for row in rows], left=arguments, label="temporaries")
    published = [
        (row["published_mb"] * 1e6 / MIB, name) for row, name in zip(rows, names, strict=True) if row["published_mb"]
    ]
    if published:
        axis.plot(*zip(*published, strict=True), "k|", markersize=14, label="published PyTorch program")
    axis.set(xlabel="MiB on the device")
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="here", help="here, or a machine that is not: h100, v5e, ...")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, choices=sorted(KNOWN_SIDES), help="image side")
    parser.add_argument("--batch", type=int, default=32, help="images; guidance doubles the rows")
    parser.add_argument("--backend", default="auto", help="backend of the local window")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the computation, hence of VAR's cache")
    parser.add_argument("--views", default="markov,full", help="markov, full or both")
    parser.add_argument("--remats", default="none,dots,full", help="remat options of training")
    parser.add_argument("--parts", default="sampling,training", help="some of sampling, training and tokenizer")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the figure")
    args = parser.parse_args(argv)
    print_arithmetic(args)
    print(
        f"\n{args.target}, depth {args.depth}, {args.size} pixels, batch {args.batch}, computed in {args.dtype}, MiB"
    )
    print("| what | view | setting | total | arguments | temporaries | compile s | published MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    try:
        rows = sampling_rows(args) if "sampling" in args.parts else []
        rows += training_rows(args) if "training" in args.parts else []
        rows += tokenizer_rows(args) if "tokenizer" in args.parts else []
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "memory.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        draw_figure(rows, args.out / "memory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
