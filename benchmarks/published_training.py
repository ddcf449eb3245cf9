"""Training steps of the published PyTorch program and of ours, alternately in one run: seconds per phase, ratio.

python benchmarks/published_training.py --published DIR    DIR: a checkout of CVL-UESTC/MVAR

float32, random weights, tokens and teacher-forcing input: forward, backward, clipping and AdamW. A cycle is the
paper's: `RATIO` steps of the coarse scales, one of each finer scale. Needs torch; takes minutes on two cores.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from benchmarks.published import import_published
from mvar_jax.errors import InputError
from mvar_jax.models.transformer import Transformer, previous_of
from mvar_jax.scales import WINDOW
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, train_step

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
CODES, CODE_WIDTH, CLASSES, RATIO = 4096, 32, 1000, 8
LEARNING_RATE, DECAY = 1e-5, 0.05


def make_batch(batch_size: int) -> dict[str, np.ndarray]:
    rng, num_tokens = np.random.default_rng(0), sum(side * side for side in SIDES)
    return {
        "ids": rng.integers(0, CODES, (batch_size, num_tokens)).astype(np.int32),
        "label": rng.integers(0, CLASSES, batch_size).astype(np.int32),
        "index": np.arange(batch_size, dtype=np.int32),
        "previous": rng.normal(size=(batch_size, num_tokens - 1, CODE_WIDTH)).astype(np.float32),
    }


def published_step(folder: Path, model: Transformer, batch: dict, num_threads: int):
    """Return (a function of a phase that runs one step of the published program, torch's version)."""
    torch, VQVAE, MVAR, notes = import_published(folder)
    for note in notes:
        print(f"note: {note}")
    torch.set_num_threads(num_threads)
    with contextlib.redirect_stdout(sys.stderr):
        vae = VQVAE(vocab_size=CODES, z_channels=CODE_WIDTH, ch=32, share_quant_resi=4, v_patch_nums=SIDES)
        mvar = MVAR(
            vae_local=vae,
            num_classes=CLASSES,
            depth=model.depth,
            embed_dim=model.width,
            num_heads=model.num_heads,
            attn_l2_norm=True,
            patch_nums=SIDES,
            kernel_size=model.kernel_size,
            refine_step=model.refine_step,
        ).train()
    optimizer = torch.optim.AdamW(mvar.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    ids, labels = (torch.from_numpy(batch[name]).long() for name in ("ids", "label"))
    previous = torch.from_numpy(batch["previous"])

    def step(phase):
        logits = mvar(
            label_B=labels,
            x_BlCv_wo_first_l=previous_of(previous, phase, 1),
            L_bg=phase.begin,
            L_ed=phase.end,
            using_nattn=phase.attention == WINDOW,
        )
        targets = ids[:, phase.begin : phase.end]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, CODES), targets.reshape(-1), reduction="sum")
        (loss / batch["ids"].size).backward()
        torch.nn.utils.clip_grad_norm_(mvar.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, torch.__version__


def our_step(model: Transformer, batch: dict):
    """Return a function of a phase that runs one compiled step of ours."""
    optimizer = OptimizerOptions()
    init = lambda: make_state(lambda: model.init_params(jax.random.key(0)), optimizer)
    state = jax.jit(lambda: nn.meta.unbox(init()))()
    inputs = {name: jnp.asarray(x) for name, x in batch.items()}
    programs, held = {}, [state]
    for phase in model.phases():
        bare = functools.partial(train_step, TransformerRecipe(model, optimizer, PhaseOptions()), (phase,))
        update = lambda state, batch, bare=bare: bare(state, batch, LEARNING_RATE, DECAY)[0]
        programs[phase] = jax.jit(update, donate_argnums=0).lower(state, inputs).compile()

    def step(phase):
        held[0] = jax.block_until_ready(programs[phase](held[0], inputs))

    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, metavar="DIR")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each phase, after a first one")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; jax uses all cores")
    args = parser.parse_args(argv)
    heads = args.depth
    model = Transformer(SIDES, 8, 7, CODES, CODE_WIDTH, CLASSES, args.depth, 64 * heads, heads)
    batch = make_batch(args.batch_size)
    try:
        theirs, version = published_step(args.published, model, batch, args.threads)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = {"published": theirs, "ours": our_step(model, batch)}
    print(f"d{args.depth}, batch {args.batch_size}, float32, jax {jax.__version__}, torch {version}", flush=True)
    totals = dict.fromkeys(steps, 0.0)
    for number, phase in enumerate(model.phases()):
        medians = time_steps({name: functools.partial(step, phase) for name, step in steps.items()}, args.rounds)
        weight = RATIO if number == 0 else 1
        totals = {name: totals[name] + weight * medians[name] for name in steps}
        ratio = medians["published"] / medians["ours"]
        listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items())
        print(f"{phase.end - phase.begin} tokens: {listed}: {ratio:.2f} times the rate", flush=True)
    listed = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in totals.items())
    print(
        f"a cycle of {RATIO} + {len(model.phases()) - 1} steps: {listed}: {totals['published'] / totals['ours']:.2f}"
    )
    return 0


def time_steps(steps: dict, rounds: int) -> dict[str, float]:
    """Return the median seconds of each step, run alternately, after one warm-up."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
