"""Evaluation: speed, memory and the compiled network, against the project's own bounds.

    python benchmarks/evaluation.py --parts features        # beside torch-fidelity, if it is installed here
    python benchmarks/evaluation.py --parts moments,manifolds,frechet
    python benchmarks/evaluation.py --parts compiled --target h100    # no device needed, but jax[cuda12]
    python benchmarks/evaluation.py --parts bfloat16

features: images/s of both networks on the same cores, run alternately, weights by a formula. moments, manifolds
(precision and recall) and frechet: 50,000 samples and 10,000 references of 2,048 random features, each in a process
of its own whose peak is printed. bfloat16: how far the Frechet distance of two sets of images moves with it. Prints
tables; the exit status is 1 if a bound is missed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

import jax
import numpy as np

from benchmarks.memory import array, make_modules, params_of
from mvar_jax.errors import InputError
from mvar_jax.evaluation import frechet_distance, inception_features, precision_recall
from mvar_jax.evaluation.features import FeatureExtractor, compute_features
from mvar_jax.evaluation.inception_weights import NETWORK, make_params, shapes, units
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.evaluation.statistics import frechet_distance_of_moments
from mvar_jax.hardware.compiling import MIB, compile_for
from mvar_jax.hardware.machines import machine_of
from mvar_jax.models.networks import Networks
from mvar_jax.ops.cost import forward_macs
from mvar_jax.sampling.sampler import decode_features

WIDTH = 2048
COMPILED_BATCH = 256
BOUNDS = {  # part -> seconds and MiB of the real job
    "moments": (15, 1000),
    "manifolds": (480, 2000),
    "frechet": (60, 2000),
}
FLOAT32_FLOPS = {"a100-80": 19.5e12, "h100": 67e12, "h200": 67e12}  # data sheets, outside the tensor cores
SIZES = argparse.Namespace(depth=16, size=256, dtype="bfloat16", backend="auto")
PARTS = ("features", *BOUNDS, "compiled", "bfloat16")
print_row = lambda *cells: print(f"| {' | '.join(map(str, cells))} |", flush=True)


def make_tensors() -> dict[str, list[np.ndarray]]:
    """Return kernel HWIO, gamma, beta, mean and variance of each unit: random, with variances that pass through."""
    rng, found = np.random.default_rng(0), {}
    for unit, shape in units().items():
        kernel = rng.normal(size=shape) * (2 / np.prod(shape[:3])) ** 0.5
        normal = rng.normal(size=(3, shape[3]))
        norm = [1 + 0.1 * normal[0], 0.2 * normal[1], 0.2 * normal[2], 1 + 0.3 * rng.random(shape[3])]
        found[unit] = [x.astype(np.float32) for x in (kernel, *norm)]
    return found


def make_weights(tensors) -> NetworkWeights:
    fc = np.random.default_rng(1).normal(size=(WIDTH, 1008)) * 0.04
    return NetworkWeights(NETWORK, make_params(tensors.__getitem__, fc), {}, False)


def make_images(num: int, side: int = 256, seed: int = 0) -> np.ndarray:
    """Return smooth colours with noise, uint8."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (num, 8, 8, 3)).repeat(side // 8, 1).repeat(side // 8, 2)
    return ((3 * tiles + rng.integers(0, 256, tiles.shape)) // 4).astype(np.uint8)


def make_torch_fidelity(tensors):
    """Return a function of pixels that runs torch-fidelity's network with these tensors, None if it is missing."""
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        print(f"note: {error}; torch-fidelity is not measured")
        return None
    import tempfile

    names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    state = {"fc.weight": torch.zeros(1008, WIDTH), "fc.bias": torch.zeros(1008)}
    for unit, (kernel, *norm) in tensors.items():
        state[f"{unit}.conv.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        state |= {f"{unit}.{name}": torch.from_numpy(x) for name, x in zip(names, norm, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save(state, path)
        outputs = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=path)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; jax {jax.__version__}")

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))[0].numpy()

    return run


def measure_features(batch: int, rounds: int) -> bool:
    """Run both networks alternately after one warm-up each; return whether ours is at least as fast.

    batch: images of each run; torch-fidelity takes them at once, ours in batches of the default size.
    """
    tensors, pixels = make_tensors(), make_images(batch)
    extractor = FeatureExtractor(make_weights(tensors))
    parts = [pixels[i : i + extractor.batch_size] for i in range(0, batch, extractor.batch_size)]
    runs = {"ours": lambda: np.concatenate([found.pool for found in extractor.stream(parts)])}
    theirs = make_torch_fidelity(tensors)
    if theirs is not None:
        runs["torch-fidelity"] = lambda: theirs(pixels)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            found[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    cores = len(os.sched_getaffinity(0))
    print_row(f"pool features of {batch} images of 256 px, {cores} cores", "s a batch", "images/s")
    print_row("---", "---", "---")
    for name, values in seconds.items():
        print_row(name, ", ".join(f"{value:.2f}" for value in values), f"{batch / median[name]:.2f}")
    if theirs is None:
        return True
    difference = np.abs(found["ours"] - found["torch-fidelity"]).max() / np.abs(found["torch-fidelity"]).max()
    ratio = median["torch-fidelity"] / median["ours"]
    print_row("largest difference, of the largest", "required <= 5e-06", f"{difference:.1e}")
    print_row("ours over torch-fidelity", "required >= 1.0", f"{ratio:.2f}")
    return ratio >= 1 and difference <= 5e-6


def random_features(num: int, seed: int) -> np.ndarray:
    """Return features as wide and as positive as the network's, float32."""
    features_ND = np.random.default_rng(seed).standard_normal((num, WIDTH), np.float32)
    return np.abs(features_ND, out=features_ND)


def run_part(part: str, samples: int, references: int) -> None:
    """Print the seconds and the peak MiB of one part as JSON."""
    ours, theirs = random_features(samples, 0), random_features(references, 1)
    begin = time.perf_counter()
    if part == "moments":
        Moments.of(ours)
    elif part == "manifolds":
        precision_recall(theirs, ours)
    else:
        a, b = Moments.of(ours), Moments.of(theirs)
        begin = time.perf_counter()
        frechet_distance_of_moments(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure_parts(parts: list[str], samples: int, references: int) -> bool:
    """Run each part in a process of its own; return whether all bounds are met. They are those of the real job."""
    print_row(f"{samples:,} samples, {references:,} references, {WIDTH} features", "required", "s", "peak MiB")
    print_row("---", "---", "---", "---")
    is_kept = True
    for part in parts:
        command = [sys.executable, __file__, "--run_part", part]
        command += ["--samples", str(samples), "--references", str(references)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
        seconds, mib = json.loads(done.stdout.splitlines()[-1])
        most_s, most_mib = BOUNDS[part]
        is_kept &= seconds <= most_s and mib <= most_mib
        print_row(part, f"<= {most_s} s, <= {most_mib:,} MiB", f"{seconds:.1f}", f"{mib:,.0f}")
    return is_kept


def num_flops(fn, *shapes_of_arguments) -> float:
    """Return the work of a program before it is compiled: XLA counts a compiled CUDA convolution as zero."""
    return jax.jit(fn).lower(*shapes_of_arguments).cost_analysis()["flops"]


def sampler_flops(batch: int) -> float:
    """Return the work of MVAR-d16 for one image, both halves of guidance and the decoder included."""
    tokenizer, transformer = make_modules(SIZES, "markov")
    side = tokenizer.sides[-1]
    networks = Networks(tokenizer, params_of(tokenizer))
    decoding = num_flops(decode_features, networks, array(batch, side, side, 32, dtype=np.float32)) / batch
    width, codes, code_width = transformer.width, transformer.vocab_size, transformer.code_width
    macs = forward_macs(transformer.pyramid, transformer.depth, width, codes, code_width, "markov")
    return 2 * 2 * macs + decoding


def measure_compiled(target: str, batch: int, side: int = 256) -> bool:
    """Compile the network for a machine that is not here; return whether it fits into 8 GB.

    Libraries' scratch memory is not included. The roofline divides the work by the peak rate of the data sheet.
    """
    pixels, name = jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8), target.partition(":")[0]
    title = f"compiled for {target}, batch {batch}, {side} px"
    print_row(title, "required", "MiB", "GFLOP an image", "roofline images/s")
    print_row("---", "---", "---", "---", "---")
    is_kept, peaks = True, {"float32": FLOAT32_FLOPS.get(name), "bfloat16": machine_of(name).peak("bfloat16")}
    rate = lambda flops, dtype: f"{peaks[dtype] / flops:,.0f}" if peaks[dtype] else "no float32 rate known"
    for dtype in peaks:
        run = lambda params, pixels, dtype=dtype: compute_features(params, pixels, dtype)
        compiled, flops = compile_for(target, run, shapes(), pixels), num_flops(run, shapes(), pixels) / batch
        is_kept &= compiled.total_bytes <= 8e9
        print_row(dtype, "<= 8 GB", f"{compiled.total_bytes / MIB:,.0f}", f"{flops / 1e9:.1f}", rate(flops, dtype))
    flops = sampler_flops(32)
    print_row("for comparison, MVAR-d16 sampling in bfloat16", "", "", f"{flops / 1e9:.1f}", rate(flops, "bfloat16"))
    return is_kept


def measure_bfloat16(num: int) -> bool:
    """Print the Frechet distance of two sets of images in float32 and in bfloat16."""
    weights = make_weights(make_tensors())
    sets = [make_images(num, 64, seed) for seed in (0, 1)]
    sets[1] = (sets[1] // 2 + 64).astype(np.uint8)
    distances = {}
    for dtype in ("float32", "bfloat16"):
        pools = [inception_features(x, weights, dtype=dtype).pool[:, :: WIDTH // 64] for x in sets]
        distances[dtype] = frechet_distance(*pools)
    change = distances["bfloat16"] / distances["float32"] - 1
    print_row(f"Frechet distance of {num} images, every 32nd feature", *distances, "change")
    print_row("---", "---", "---", "---")
    print_row("", *(f"{value:.4f}" for value in distances.values()), f"{100 * change:+.3f}%")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="features", help=f"any of {','.join(PARTS)}")
    parser.add_argument("--batch", type=int, default=32, help="images of a batch, for features")
    parser.add_argument("--rounds", type=int, default=5, help="for features, after one to warm up")
    parser.add_argument("--samples", type=int, default=50_000, help="for moments, manifolds and frechet")
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--target", default="h100", help="for compiled")
    parser.add_argument("--images", type=int, default=128, help="for bfloat16")
    parser.add_argument("--run_part", choices=BOUNDS, help=argparse.SUPPRESS)  # for the processes that are started
    args = parser.parse_args(argv)
    if args.run_part:
        run_part(args.run_part, args.samples, args.references)
        return 0
    parts, is_kept = args.parts.split(","), True
    try:
        if unknown := [part for part in parts if part not in PARTS]:
            expected = f"some of {','.join(PARTS)}"
            message = f"--parts must be {expected}, got {unknown[0]}"
            raise InputError(message, field="parts", given=unknown[0], expected=expected)
        if "features" in parts:
            is_kept &= measure_features(args.batch, args.rounds)
        if of_features := [part for part in BOUNDS if part in parts]:
            is_kept &= measure_parts(of_features, args.samples, args.references)
        if "compiled" in parts:
            is_kept &= measure_compiled(args.target, COMPILED_BATCH)
        if "bfloat16" in parts:
            is_kept &= measure_bfloat16(args.images)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
