"""Memory of the published sizes by XLA's own figures: sampling, training (Markov and VAR view), the tokenizer's.

    python benchmarks/memory.py --target h100 --depth 16 --out out    # no device needed, but jax[cuda12]
    python benchmarks/memory.py --target h100 --parts tokenizer --batch 8

The total is everything on the device: arguments (weights, optimizer), outputs and temporaries, donated buffers
counted once. Also prints the published programs' peak and the arithmetic of ops/cost.py, and writes memory.csv and
memory.png.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import MIB, compile_for
from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.models.lpips import shapes as lpips_shapes
from mvar_jax.models.networks import Networks
from mvar_jax.models.tokenizer import Tokenizer, quantizer_params
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.cost import attention_macs, forward_macs, kv_cache_bytes
from mvar_jax.sampling.sampler import SampleOptions, decode_features, sample
from mvar_jax.scales import KNOWN_SIDES
from mvar_jax.training import tokenizer_step
from mvar_jax.training.adversary import Adversary, AdversaryOptions, FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, train_step
from mvar_jax.training.transformer_task import with_input

# (view, depth, what) -> peak MB that the paper prints for its PyTorch programs, batch 32
PUBLISHED_MB = {
    ("markov", 16, "sampling"): 3846,
    ("full", 16, "sampling"): 10882,
    ("markov", 20, "sampling"): 5432,
    ("full", 20, "sampling"): 16244,
    ("markov", 24, "sampling"): 7216,
    ("full", 24, "sampling"): 23056,
    ("markov", 16, "training"): 20676,
    ("full", 16, "training"): 34319,
    ("markov", 20, "training"): 27665,
    ("full", 20, "training"): 48173,
    ("markov", 24, "training"): 38579,
}
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


def compile_step(target: str, modules, batch: int, phase, remat: str):
    """Compile one optimizer step of one phase: float32 weights and AdamW state, no moving average."""
    tokenizer, transformer = modules
    transformer = transformer.clone(remat=remat)
    options = OptimizerOptions(ema_decay=0.0)
    state = shapes_like(lambda: make_state(lambda: transformer.init_params(jax.random.key(0)), options))

    recipe = TransformerRecipe(transformer, options, PhaseOptions())

    def step(state, batch, networks, learning_rate, weight_decay):
        return train_step(recipe, (phase,), state, with_input(networks, batch), learning_rate, weight_decay)

    rows = {"ids": array(batch, transformer.pyramid.num_tokens), "label": array(batch), "index": array(batch)}
    rate = array(dtype=jnp.float32)
    networks = Networks(tokenizer, quantizer_params(params_of(tokenizer)))
    return compile_for(target, step, state, rows, networks, rate, rate, donate=(0,))


def compile_tokenizer_step(target: str, tokenizer: Tokenizer, batch: int, kind: str):
    """Compile one optimizer step of the tokenizer with L1, L2, LPIPS, scale dropout and a moving average.

    kind: of the discriminator, patch or none.
    """
    options = OptimizerOptions(ema_decay=0.9999)
    losses = CodebookOptions(l1_weight=0.2, perceptual_weight=1.0, scale_dropout=0.1)
    adversary = Adversary(AdversaryOptions(kind="patch"), PatchDiscriminator(dtype=tokenizer.dtype))
    recipe = tokenizer_step.TokenizerRecipe(
        tokenizer, options, losses, adversary=None if kind == "none" else adversary
    )
    size = tokenizer.image_size

    def start():
        key = jax.random.key(0)
        extra = {"hits": jnp.zeros((len(tokenizer.sides), tokenizer.vocab_size))}
        extra["adversary"] = adversary.init_state(options, key, (size, size, 3))
        return make_state(lambda: tokenizer.init_params(key), options, extra)

    def step(state, batch, fixed, *rates):
        return tokenizer_step.train_step(recipe, state, batch, *rates, fixed)

    rows = {"image": array(batch, size, size, 3, dtype=jnp.uint8), "index": array(batch, dtype=jnp.uint32)}
    rate = array(dtype=jnp.float32)
    fixed = FixedWeights(lpips_shapes())
    return compile_for(target, step, shapes_like(start), rows, fixed, rate, rate, rate, donate=(0,))


def make_row(what: str, view: str, setting: str, depth: int, batch: int, compiling) -> dict:
    begin = time.perf_counter()
    compiled = compiling()
    row = {"what": what, "view": view, "setting": setting, "compile_s": time.perf_counter() - begin}
    row["total_mib"] = compiled.total_bytes / MIB
    row["argument_mib"], row["temp_mib"] = compiled.argument_bytes / MIB, compiled.temp_bytes / MIB
    row["published_mb"] = PUBLISHED_MB.get((view, depth, what)) if batch == 32 else None
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
    for view in args.views.split(","):
        modules = make_modules(args, view)
        for phase in modules[1].phases():
            for remat in args.remats.split(","):
                setting = f"{phase.num_tokens} tokens, remat {remat}"
                compiling = lambda modules=modules, phase=phase, remat=remat: compile_step(
                    args.target, modules, args.batch, phase, remat
                )
                rows.append(make_row("training", view, setting, args.depth, args.batch, compiling))
    return rows


def tokenizer_rows(args) -> list[dict]:
    rows = []
    tokenizer = make_modules(args, "markov")[0]
    for kind in ("none", "patch"):
        for remat in (False, True):
            setting = f"batch {args.batch}, discriminator {kind}, remat {remat}"
            compiling = lambda kind=kind, remat=remat: compile_tokenizer_step(
                args.target, tokenizer.clone(remat=remat), args.batch, kind
            )
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
