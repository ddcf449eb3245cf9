"""Both tasks on meshes of eight virtual devices: prints the worst difference of losses, what is gathered and summed.

`python mesh_case.py` takes the pairs that the tests use, `python mesh_case.py all` every task on every mesh.
"""

import functools
import json
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from small_case import MODEL, TOKENIZER, seeded_batch, seeded_params

from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.ops.platform import compiling_for
from mvar_jax.sharding import make_mesh, put_batch, replicated, use_mesh
from mvar_jax.training import tokenizer_step
from mvar_jax.training.adversary import Adversary, AdversaryOptions
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import abstract_sharded, make_state
from mvar_jax.training.transformer_step import PhaseOptions, TransformerRecipe, phase_loss, train_step

NUM_STEPS = 5
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
# each compilation takes seconds, so the tests see each kind of mesh and each task, but not all pairs
TESTED = {
    "block_diagonal": ((8, 1, 1), (2, 2, 2)),
    "window": ((1, 8, 1), (1, 1, 8)),
    "tokenizer": ((2, 2, 2),),
    "adversarial": ((2, 2, 2),),
}
# every dimension that matters is told from all others: 9 + 36 tokens, 24 codes, 8 heads of width 5
TRANSFORMER = MODEL.clone(sides=(3, 6), refine_step=1, num_heads=8, width=40, vocab_size=24, drop_path_rate=0.2)
AUTOENCODER = TOKENIZER.clone(sides=(3, 6), ch_mult=(1,), num_phi=1, vocab_size=24)
OPTIMIZER, PHASES = OptimizerOptions(), PhaseOptions()
CODEBOOK = CodebookOptions(
    entropy_weight=0.1, entropy_until_step=100, entropy_temperature=0.5, scale_dropout=0.5, scale_dropout_first=1
)
ADVERSARY = Adversary(AdversaryOptions(kind="patch"), PatchDiscriminator(layers=1, width=8))
EXTRA = {"hits": jnp.zeros((2, 24))}


def make_cases() -> dict:
    """name -> (module, batch, step, extra state)."""
    rng = np.random.default_rng(0)
    batch = {name: np.asarray(x) for name, x in seeded_batch(TRANSFORMER, 8).items()}
    del batch["previous"]
    weights = rng.normal(size=(36, TRANSFORMER.code_width)).astype(np.float32)
    embed = lambda ids_BL: jnp.sin(ids_BL[:, 9:, None] * weights)
    cases = {}
    for phase in TRANSFORMER.phases():
        step = functools.partial(embedded_step, embed, (phase,))
        cases[phase.attention] = (TRANSFORMER, batch, step, {})
    images = {"image": rng.integers(0, 256, (8, 6, 6, 3), np.uint8), "index": np.arange(8, dtype=np.uint32)}
    step = functools.partial(
        tokenizer_step.train_step, tokenizer_step.TokenizerRecipe(AUTOENCODER, OPTIMIZER, CODEBOOK)
    )
    cases["tokenizer"] = (AUTOENCODER, images, step, dict(EXTRA))
    recipe = tokenizer_step.TokenizerRecipe(AUTOENCODER, OPTIMIZER, CODEBOOK, 2, adversary=ADVERSARY)
    adversarial = functools.partial(adversarial_step, functools.partial(tokenizer_step.train_step, recipe))
    part = ADVERSARY.init_state(OPTIMIZER, jax.random.key(1), (6, 6, 3))
    images = {**images, "index": np.arange(8, dtype=np.uint32)}
    cases["adversarial"] = (AUTOENCODER, images, adversarial, EXTRA | {"adversary": part})
    return cases


def adversarial_step(step, state, batch, learning_rate, weight_decay):
    """A step in which the discriminator learns at a rate of its own; its loss counts, to be compared too."""
    state, metrics = step(state, batch, learning_rate, weight_decay, 2 * learning_rate)
    return state, {**metrics, "loss": metrics["loss"] + metrics["discriminator_loss"]}


def embedded_step(embed, phases, state, batch, *rates):
    """A transformer step whose teacher-forcing input is some function of the ids."""
    recipe = TransformerRecipe(TRANSFORMER, OPTIMIZER, PHASES)
    return train_step(recipe, phases, state, {**batch, "previous": embed(batch["ids"])}, *rates)


def run(step, state, batch) -> list[float]:
    losses = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, batch, np.float32(0.01), np.float32(0.05))
        losses.append(float(metrics["loss"]))
    return losses


def shapes_exchanged(text: str, kind: str) -> list[list[int]]:
    """Result shapes of the collectives of a kind in a compiled program."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(found))
    return [[int(n) for n in shape.split(",") if n] for shape in shapes]


def check_placement(state) -> None:
    """Of the transformer on the mixed mesh: width over fsdp, heads over tensor, moments as their parameters."""
    qkv = state.params["blocks"]["attention"]["qkv"]  # [layers, width, 3, heads, head width]
    assert qkv.addressable_shards[0].data.shape == (2, 20, 3, 4, 5), qkv.sharding
    moment = state.opt_state.inner_states["rest"].inner_state.mu["blocks"]["attention"]["qkv"]
    assert moment.sharding == qkv.sharding
    assert state.params["class_embed"].addressable_shards[0].data.shape == (4, 20)


def worst_gradient() -> float:
    """Return the largest relative difference of a parameter's gradient, computed in bfloat16 over eight devices, from
    that of one device."""
    model, phase = TRANSFORMER.clone(dtype=jnp.bfloat16), TRANSFORMER.phases()[1]
    params, batch = seeded_params(model, std=0.1), seeded_batch(model, 8)

    # results rounded where the program says, not where fusions end, which differ between one row and eight
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def grads(params, batch):
        return jax.grad(lambda params: phase_loss(model, params, batch, phase)[0])(params)

    mesh = make_mesh(8)
    with compiling_for("tpu"):  # the same form of products for one device and for several
        one = grads(params, batch)
    with compiling_for("tpu"), use_mesh(mesh):
        placed = put_batch({name: np.asarray(x) for name, x in batch.items()}, mesh)
        several = grads(jax.device_put(params, replicated(mesh)), placed)
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    errors = jax.tree.map(lambda a, b: norm(np.asarray(a) - np.asarray(b)) / max(norm(b), 1e-30), several, one)
    return max(jax.tree.leaves(errors))


def main():
    report = {}
    for name, (module, batch, step, extra) in make_cases().items():
        params = seeded_params(module, std=0.1)
        start = lambda params=params, extra=extra: make_state(lambda: params, OPTIMIZER, nn.meta.unbox(extra))
        state = jax.jit(start)()
        expected = run(jax.jit(step), state, batch)
        boxed = lambda: make_state(lambda: module.init_params(jax.random.key(0)), OPTIMIZER, extra)  # noqa: B023
        for sizes in MESHES if "all" in sys.argv else TESTED[name]:
            mesh = make_mesh(*sizes)
            shardings = jax.tree.map(lambda x: x.sharding, abstract_sharded(boxed, mesh))
            with use_mesh(mesh):
                placed = put_batch(batch, mesh)
                assert next(iter(placed.values())).addressable_shards[0].data.shape[0] == 8 // (sizes[0] * sizes[1])
                lowered = jax.jit(step, out_shardings=(shardings, None)).lower(
                    jax.device_put(state, shardings), placed, np.float32(0), np.float32(0)
                )
                program = lowered.compile()
                start = jax.device_put(state, shardings)
                if module is TRANSFORMER and sizes == (2, 2, 2):
                    check_placement(start)
                losses = run(program, start, placed)
            report[f"{name} {sizes}"] = {
                "losses": losses,
                "worst": float(np.max(np.abs(np.array(losses) / expected - 1))),
                "gathers": shapes_exchanged(program.as_text(), "all-gather"),
                "sums": shapes_exchanged(program.as_text(), "all-reduce"),
            }
    print(json.dumps({"devices": len(jax.devices()), "runs": report, "worst_gradient": worst_gradient()}))


if __name__ == "__main__":
    main()
