"""The adversarial step of a tokenizer: one backward pass, two optimizers, and nothing before its start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit
from small_case import TOKENIZER, seeded_params

from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.ops.adversarial import adaptive_weight, discriminator_loss, generator_loss, lecam_loss
from mvar_jax.ops.augment import Pass, augment, draw_augmentations
from mvar_jax.ops.pixels import from_levels
from mvar_jax.sharding import make_mesh
from mvar_jax.training.adversary import Adversary, AdversaryOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import init_sharded, make_state
from mvar_jax.training.tokenizer_losses import Judge, LogitMeans, adversarial_gradients, draw_passes
from mvar_jax.training.tokenizer_step import CodebookOptions, TokenizerRecipe, forward, train_step

SIZE, B = 6, 4
MODEL = TOKENIZER.clone(sides=(2, 6), ch=4, ch_mult=(1,), num_phi=1)
NETWORK = PatchDiscriminator(layers=1, width=4)
OPTIONS = AdversaryOptions(kind="patch", start_step=2, ramp_steps=2, warmup_steps=4, lecam_weight=0.1, lecam_decay=0.5)
ADVERSARY = Adversary(OPTIONS, NETWORK)
OPTIMIZER = OptimizerOptions(weight_decay=0.05, ema_decay=0.5)
LOSSES = CodebookOptions(l1_weight=0.2)
PIXELS = np.random.default_rng(0).integers(0, 256, (B, SIZE, SIZE, 3), np.uint8)
IMAGES = jnp.asarray(from_levels(PIXELS))
BATCH = {"image": PIXELS, "index": np.arange(7, 7 + B, dtype=np.uint32)}
RATES = (np.float32(0.01), np.float32(0.05), np.float32(0.02))


def make_test_state():
    def make():
        part = ADVERSARY.init_state(OPTIMIZER, jax.random.key(1, impl="rbg"), IMAGES.shape[1:])
        extra = {"hits": jnp.zeros((2, MODEL.vocab_size)), "adversary": part}
        return make_state(lambda: MODEL.init_params(jax.random.key(0, impl="rbg")), OPTIMIZER, extra)

    state = init_sharded(make, make_mesh(devices=jax.devices()[:1]))[0]
    part = {**state.extra["adversary"], "params": seeded_params_like(state.extra["adversary"]["params"])}
    return state.replace(step=jnp.int32(3), params=seeded_params(MODEL), extra={**state.extra, "adversary": part})


def seeded_params_like(params):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def state():
    return make_test_state()


@pytest.fixture(scope="module")
def step():
    """A step at which the discriminator trains, with all of the adversarial weight."""
    return quick_jit(functools.partial(train_step, TokenizerRecipe(MODEL, OPTIMIZER, LOSSES, adversary=ADVERSARY)))


def two_backward_passes(state, seed: int = 0):
    """Return (lambda, gradients of the generator and of the discriminator) by their definitions."""
    part, step = state.extra["adversary"], state.step
    logits = lambda params, x, of: NETWORK.apply(
        {"params": params}, augment(x, draw_augmentations(seed, BATCH["index"], step, of))
    )

    def losses(params):
        (rec, other), _ = forward(MODEL, params, {"image": IMAGES}, True)
        pixels = 0.2 * jnp.mean(jnp.abs(rec - IMAGES)) + jnp.mean(jnp.square(rec - IMAGES))
        return pixels, generator_loss(logits(part["params"], rec, Pass.GENERATOR)), other, rec

    of_pixels, of_logits = (jax.grad(lambda p, i=i: losses(p)[i])(state.params) for i in (0, 1))
    factor = adaptive_weight(*(grads["decoder"]["conv_out"]["kernel"] for grads in (of_pixels, of_logits)))
    weigh = lambda found: found[0] + OPTIONS.weight_at(step) * factor * found[1] + found[2]
    grads = jax.grad(lambda p: weigh(losses(p)))(state.params)

    def discriminate(params):
        real, fake = logits(params, IMAGES, Pass.REAL), logits(params, losses(state.params)[3], Pass.FAKE)
        lecam = lecam_loss(real, fake, LogitMeans(**part["means"]))
        return discriminator_loss(real, fake) + 0.1 * lecam

    return factor, grads, jax.grad(discriminate)(part["params"])


@pytest.mark.parametrize("num_parts", [1, 2])
def test_one_backward_pass_gives_the_gradients_of_two(state, num_parts):
    """The adaptive weight from the last convolution alone, also with accumulation, where it comes from the sums."""

    def one_pass(state):
        rows = {"image": IMAGES, "draws": draw_passes(0, BATCH["index"], state.step)}
        fixed, last = None, state.params["decoder"]["conv_out"]
        judge = Judge(MODEL, LOSSES.pixel_weights, ADVERSARY, FIXED, last, state.extra["adversary"])
        found = adversarial_gradients(
            lambda params, part: forward(MODEL, params, part, True),
            state.params,
            rows,
            num_parts,
            judge,
            OPTIONS.weight_at(state.step),
        )
        return found.parts["adaptive_weight"], found.grads, found.discriminator_grads

    found, expected = quick_jit(one_pass)(state), quick_jit(two_backward_passes)(state)
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    scale = norm(expected[1]["decoder"]["conv_out"]["kernel"])
    assert scale > 0.01
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert norm(np.asarray(ours) - np.asarray(theirs)) < 1e-4 * max(norm(theirs), 1e-2)
