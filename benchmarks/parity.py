"""Differences to the published program: a table of the worst ones; exit status 1 if one exceeds its tolerance.

`python benchmarks/parity.py` converts the golden checkpoints of tests/golden/tiny and compares with the numbers that
the published programs computed from them. `--published DIR` runs the published PyTorch program (a checkout of
CVL-UESTC/MVAR) and ours on published weights, random images and labels, on a CPU.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.comparison import (
    Compiled,
    Table,
    channels_first,
    load_published_files,
    teacher_forced,
    tokenizer_forward,
)
from benchmarks.published import compare_published
from mvar_jax.errors import InputError
from mvar_jax.models.networks import apply_tokenizer
from mvar_jax.ops.losses import token_cross_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.sampler import (
    SampleOptions,
    guided_logits,
    sample_pyramid,
)

GOLDEN = ROOT / "tests" / "golden" / "tiny"
MARKOV_CFGS, VAR_CFGS = (1.0, 2.7), (1.0, 1.5, 2.7)  # guidance of the golden samples


def image_pairs(images_BYX3, golden: dict, name: str, grid: int):
    """Yield a grid of pixels, a seeded subset and each channel's statistics, the form of images in golden files."""
    x = channels_first(images_BYX3)
    yield x[:, :, ::grid, ::grid], golden[f"{name}_grid{grid}"]
    yield x.reshape(-1)[golden[f"{name}_idx"]], golden[f"{name}_val"]
    yield x.mean((2, 3), dtype=np.float64), golden[f"{name}_mean"]
    yield x.std((2, 3), dtype=np.float64), golden[f"{name}_std"]


def mean_loss(model, logits_BNV, ids_BN) -> np.ndarray:
    """Return the training loss of a pass: weight 1/L per token, mean over the batch."""
    nll_BN = np.asarray(token_cross_entropy(logits_BNV, jnp.asarray(ids_BN)), np.float64)
    return nll_BN.sum(1).mean() / model.num_tokens


def read_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def add_tokenizer(table: Table, model) -> None:
    golden = read_golden("tokenizer")
    images = jnp.asarray((2 * golden["image_u8"].astype(np.float32) / 255 - 1).transpose(0, 2, 3, 1))
    f, (raw, vq_loss, encoded) = tokenizer_forward(model.networks, images)
    table.add("tokenizer f", "f", (channels_first(f), golden["f"]))
    table.add("tokenizer ids (number that differ)", "ids", (encoded.ids_BL, golden["ids"]))
    for scale, f_hat in enumerate(encoded.f_hats):
        table.add(f"f_hat, scale {scale}", "f_hat", (channels_first(f_hat), golden["f_hat_scales"][scale]))
    pairs = [*image_pairs(model.decode(golden["ids"]), golden, "rec_last", 8)]
    table.add("reconstruction", "images", *pairs, *image_pairs(raw, golden, "train_fwd_rec", 16))
    previous = apply_tokenizer(model.networks, jnp.asarray(golden["ids"]), "teacher_forcing")
    table.add("teacher-forcing input", "teacher-forcing input", (previous, golden["mvar_input"]))
    table.add("quantizer loss (relative)", "losses", (vq_loss, golden["vq_loss"]))
    mse = np.mean(np.square(np.asarray(raw - images, np.float64)))
    table.add("reconstruction mse (relative)", "losses", (mse, golden["rec_mse"]))


def logits_pairs(logits_BNV, golden: dict, prefix: str):
    yield logits_BNV[:, golden[f"{prefix}pos"]], golden[f"{prefix}logits"]
    yield jax.nn.logsumexp(logits_BNV, axis=-1), golden[f"{prefix}lse"]


def add_training(table: Table, model, file: str, title: str, prefix: str) -> None:
    """Compare teacher-forced passes. prefix: the golden file's names of phase {i}."""
    golden, tokens = read_golden(file), read_golden("tokenizer")
    run = functools.partial(teacher_forced, model.networks, jnp.asarray(tokens["mvar_input"]))
    labels = jnp.asarray(golden["labels"])
    all_logits, dropped = run(labels), run(jnp.full_like(labels, model.num_classes))
    for i, phase in enumerate(model.transformer.phases()):
        name, key = title.format(i=i), prefix.format(i=i)
        ids = tokens["ids"][:, phase.begin : phase.end]
        table.add(f"{name} logits", "logits", *logits_pairs(all_logits[i], golden, key))
        table.add(f"{name} loss (relative)", "losses", (mean_loss(model, all_logits[i], ids), golden[f"{key}loss"]))
        expected = golden[f"{key}drop_logits"]
        table.add(f"{name} label-dropped logits", "logits", (dropped[i][:, golden[f"{key}pos"]], expected))
        if f"{key}drop_loss" in golden:
            loss = mean_loss(model, dropped[i], ids)
            table.add(f"{name} label-dropped loss (relative)", "losses", (loss, golden[f"{key}drop_loss"]))


def compile_modules(model):
    """Return the model's networks with compiled modules."""
    tokenizer, transformer = Compiled(model.tokenizer), Compiled(model.transformer)
    return model.networks.replace(tokenizer=tokenizer, transformer=transformer)


def draw_greedily(networks, labels_B, cfg: float):
    """Return (ids, f_hat, guided logits of each scale)."""
    logits_fn = guided_logits(networks, jnp.asarray(labels_B), cfg)
    keys = keys_of_samples(0, np.arange(len(labels_B)))
    return sample_pyramid(logits_fn, networks, keys, SampleOptions(cfg, top_k=1))


def add_draw(table: Table, model, networks, title: str, golden: dict, prefix: str, cfg: float) -> None:
    ids, f_hat, all_logits = draw_greedily(networks, golden[f"{prefix}labels"], cfg)
    table.add(f"{title} ids (number that differ)", "ids", (ids, golden[f"{prefix}ids"]))
    keys = [f"{prefix}logits{scale}" for scale in range(len(all_logits))]
    pairs = [(x[:, golden[f"{key}_pos"]], golden[key]) for key, x in zip(keys, all_logits, strict=True)]
    table.add(f"{title} guided logits", "guided logits", *pairs)
    table.add(f"{title} f_hat", "f_hat", (channels_first(f_hat), golden[f"{prefix}f_hat"]))
    images = model.decode_features(f_hat)
    is_01 = f"{prefix}img01_val" in golden
    named = ((images + 1) / 2, golden, f"{prefix}img01") if is_01 else (images, golden, f"{prefix}img")
    table.add(f"{title} image", "images", *image_pairs(*named, 8))


def add_markov(table: Table, model) -> None:
    add_training(table, model, "train", "phase {i}", "p{i}_")
    networks = compile_modules(model)
    for cfg in MARKOV_CFGS:
        add_draw(table, model, networks, f"greedy cfg {cfg}", read_golden(f"sample_cfg{cfg}"), "", cfg)


def add_var(table: Table, model) -> None:
    add_training(table, model, "var", "VAR", "")
    networks = compile_modules(model)
    for cfg in VAR_CFGS:
        add_draw(table, model, networks, f"VAR greedy cfg {cfg}", read_golden("var"), f"cfg{cfg}_", cfg)


# (transformer file, its conditioning, comparisons)
GOLDEN_PARTS = (("mvar.pth", "markov", (add_tokenizer, add_markov)), ("var.pth", "full", (add_var,)))


def compare_golden() -> Table:
    table = Table()
    for file, conditioning, parts in GOLDEN_PARTS:
        model = load_published_files(GOLDEN / "vae.pth", GOLDEN / file, conditioning=conditioning)
        for add in parts:
            add(table, model)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", metavar="DIR", help="checkout of CVL-UESTC/MVAR to run beside ours")
    parser.add_argument("--tokenizer", metavar="FILE", help="published weights (default DIR/vae_ch160v4096z32.pth)")
    parser.add_argument("--transformer", metavar="FILE", help="published weights (default DIR/mvar-d16.pth)")
    parser.add_argument("--num_images", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and labels")
    parser.add_argument("--cfg", type=float, default=2.7, help="guidance of the greedy sample")
    args = parser.parse_args(argv)
    try:
        for name in ("tokenizer", "transformer"):
            if args.published is None and getattr(args, name) is not None:
                message = f"--{name} needs --published DIR"
                raise InputError(message, field=name, given=getattr(args, name), expected="--published DIR")
        if args.num_images < 1:
            message = f"--num_images must be 1 or more, got {args.num_images}"
            raise InputError(message, field="num_images", given=args.num_images, expected="1 or more")
        table = compare_golden() if args.published is None else compare_published(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    return 0 if table.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
