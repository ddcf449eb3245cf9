"""The adversarial step of a tokenizer: one backward pass, two optimizers, and nothing before its start."""

import dataclasses
import itertools

import eval_case
import jax
import jax.numpy as jnp
import loss_case
import numpy as np
import pytest
import torch_files
from golden_case import assert_close, assert_gradients_close, quick_jit
from small_case import TOKENIZER, seeded_params, shapes_of

from mvar_jax import build
from mvar_jax.checkpoints.manager import Checkpoints
from mvar_jax.cli.configuration import read_config
from mvar_jax.errors import InputError
from mvar_jax.evaluation.lpips import params_of_torch
from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.ops.adversarial import adaptive_weight, discriminator_loss, generator_loss, lecam_loss
from mvar_jax.ops.augment import Pass, augment, draw_augmentations
from mvar_jax.ops.pixels import from_levels
from mvar_jax.sharding import make_mesh
from mvar_jax.training.adversary import Adversary, AdversaryOptions, FixedWeights
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import init_sharded, make_state
from mvar_jax.training.tokenizer_losses import Judge, LogitMeans, PixelWeights, adversarial_gradients, draw_passes
from mvar_jax.training.tokenizer_step import forward

SIZE, B = 6, 4
MODEL = TOKENIZER.clone(sides=(2, 6), ch=4, ch_mult=(1,), num_phi=1)
NETWORK = PatchDiscriminator(layers=1, width=4)
OPTIONS = AdversaryOptions(kind="patch", start_step=2, ramp_steps=2, warmup_steps=4, lecam_weight=0.1)
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


def test_one_backward_pass_with_accumulation_gives_the_gradients_of_two_of_the_whole_batch(state):
    """The adaptive weight from the last convolution alone, of the sums over both parts."""

    def one_pass(state):
        rows = {"image": IMAGES, "draws": draw_passes(0, BATCH["index"], state.step)}
        last = state.params["decoder"]["conv_out"]
        judge = Judge(MODEL, LOSSES.pixel_weights, ADVERSARY, FixedWeights(), last, state.extra["adversary"])
        found = adversarial_gradients(
            lambda params, part: forward(MODEL, params, part, True),
            state.params,
            rows,
            2,
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


# sums over two threads differ by the kind of CPU, and a ReLU of LPIPS that flips moves gradients by a thousandth
ONE_THREAD = {"xla_backend_optimization_level": 0, "xla_cpu_multi_thread_eigen": False}


def test_gradients_of_both_networks_equal_pytorch(tmp_path):
    """Of the whole loss with LPIPS, LeCam and lambda: the program in benchmarks/ takes two backward passes."""
    golden, model, weights = loss_case.load("loss"), loss_case.TOKENIZER, loss_case.WEIGHTS
    files = tmp_path / "vgg.pth", tmp_path / "heads.pth"
    for path, tensors in zip(files, (eval_case.vgg_state(), eval_case.heads_state()), strict=True):
        torch_files.save(path, tensors)
    options = AdversaryOptions(kind="patch", augment=False, lecam_weight=weights["lecam"])
    part = {"params": loss_case.discriminator_params(), "spectral": {}, "means": loss_case.MEANS}
    pixels = PixelWeights(*(weights[name] for name in ("l1", "l2", "perceptual")))

    def gradients(params, part, perceptual):
        last, fixed = params["decoder"]["conv_out"], FixedWeights(perceptual)
        judge = Judge(model, pixels, Adversary(options, loss_case.DISCRIMINATOR), fixed, last, part)
        run = lambda params, rows: forward(model, params, rows, True)
        rows = {"image": jnp.asarray(loss_case.pixels())}
        return adversarial_gradients(run, params, rows, 1, judge, options.weight_at(0))

    found = jax.jit(gradients, compiler_options=ONE_THREAD)(
        loss_case.tokenizer_params(), part, params_of_torch(*files)
    )
    parts, tolerance = found.parts, {"rtol": 1e-3, "atol": 1e-6}
    told = {"l1": "l1_loss", "l2": "l2_loss", "perceptual": "perceptual_loss", "quantizer": "quantizer_loss"}
    told |= {"adversarial": "adversarial_loss", "lambda": "adaptive_weight", "hinge": "discriminator_loss"}
    for name, ours in (told | {"lecam": "lecam_loss"}).items():
        assert_close(name, parts[ours], golden[name], rtol=1e-4)
    assert_close("generator", found.loss, golden["generator"], rtol=1e-4)
    assert_gradients_close("G", loss_case.published_gradients(found.grads), golden, "grad", tolerance)
    ours = loss_case.published_discriminator(found.discriminator_grads)
    assert_gradients_close("D", ours, golden, "d_grad", tolerance)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


CONFIG = {"data.image_size": 12, "model.ch_mult": (1, 1), "model.sides": (2, 6), "codebook.warmup_steps": 1}
CONFIG |= {"codebook.revive_every_steps": 0, "num_steps": 8}
SECTION = dict(kind="patch", start_step=2, ramp_steps=2, warmup_steps=2, layers=1, width=4)


def make_task(section=SECTION, **changes):
    config = read_config("debug", [])
    for key, value in (CONFIG | changes).items():
        *path, name = key.split(".")
        place = config
        for part in path:
            place = place[part]
        place[name] = value
    return build.build_task({**config, "adversary": dict(section)})[0]


@pytest.fixture(scope="module")
def run_of_six_steps():
    """(task, states after 0, 1, ... 6 steps, metrics of each): two before the start, two in the ramp, two after."""
    task = make_task()
    states, told, state = [], [], task.init_state()
    batches = task.batches(0)
    for number in range(6):
        states.append(jax.device_get(state))
        state, metrics = task.train_step(state, next(batches), number)
        told.append(jax.device_get(metrics))
    batches.close()
    return task, [*states, jax.device_get(state)], told


def test_discriminator_costs_and_changes_nothing_before_its_start(run_of_six_steps):
    task, states, told = run_of_six_steps
    adversary = [state.extra["adversary"] for state in states]
    assert_equal(adversary[0], adversary[2])
    assert int(adversary[-1]["step"]) == 4
    assert all(("discriminator_loss" in metrics) == (number >= 2) for number, metrics in enumerate(told))
    rates = [metrics["discriminator_learning_rate"] / metrics["learning_rate"] for metrics in told[2:]]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1])
    assert task.flops_of_step(1) < task.flops_of_step(2) == task.flops_of_step(5)


def test_both_networks_move_and_the_discriminator_keeps_its_statistics(run_of_six_steps):
    _, states, told = run_of_six_steps
    metrics = told[4]
    before, after = (state.extra["adversary"] for state in states[4:6])
    for old, fresh in ((states[4].params, states[5].params), (before["params"], after["params"])):
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), old, fresh)))
    for side in ("real", "fake"):
        expected = 0.999 * before["means"][side] + 0.001 * metrics[f"{side}_logits"]
        assert after["means"][side] == pytest.approx(expected, rel=1e-4) and expected
    assert all(np.isfinite(metrics[name]) for name in ("lecam_loss", "grad_norm", "discriminator_grad_norm"))
    weight = 0.4 * metrics["adaptive_weight"]
    total = metrics["l2_loss"] + metrics["quantizer_loss"] + weight * metrics["adversarial_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("spoilt", ["tokenizer", "discriminator"])
def test_step_that_is_not_finite_changes_neither_network(run_of_six_steps, spoilt):
    task, states, _ = run_of_six_steps
    state, part = states[4], dict(states[4].extra["adversary"])
    params = state.params
    if spoilt == "tokenizer":
        params = {**params, "encoder": jax.tree.map(lambda x: x * np.nan, params["encoder"])}
    else:
        last = jax.tree.map(lambda x: x + np.inf, part["params"]["conv_out"])
        part["params"] = {**part["params"], "conv_out": last}
    bad = state.replace(params=params, extra={**state.extra, "adversary": part})
    batch = next(itertools.islice(task.batches(4), 1))
    new, metrics = jax.device_get(task.train_step(jax.device_put(bad, task.shardings), batch, 4))
    assert metrics["is_bad"] == 1 and new.extra["adversary"]["step"] == part["step"] + 1
    kept = lambda s: {**s.extra["adversary"], "step": 0}
    assert_equal((new.params, new.ema, new.opt_state), (bad.params, bad.ema, bad.opt_state))
    assert_equal(kept(new), kept(bad))


@pytest.mark.parametrize("number", [1, 3, 5])
def test_run_resumes_bit_equal_before_in_and_after_the_ramp(run_of_six_steps, tmp_path, number):
    """From its checkpoint, which holds the discriminator, its moments and the means of its logits."""
    task, states, told = run_of_six_steps
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(jax.device_put(states[number], task.shardings), {})
        checkpoints.wait()
        restored = checkpoints.restore(task.abstract_state(), say=str)
    batches = itertools.islice(task.batches(number), 1)
    new, metrics = task.train_step(restored, next(batches), number)
    assert_equal(jax.device_get(new), states[number + 1])
    assert_equal(jax.device_get(metrics), told[number])


def test_weight_grows_over_the_ramp():
    weights = [float(OPTIONS.weight_at(jnp.int32(step))) for step in (2, 3, 4)]
    np.testing.assert_allclose(weights, [0.2, 0.4, 0.4])
    at_once = dataclasses.replace(OPTIONS, ramp_steps=0, warmup_steps=0)
    assert float(at_once.weight_at(2)) == pytest.approx(0.4) and at_once.rate_at(2, np.float32(3)) == 3


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ({"start_step": 8}, {}, "config.adversary.start_step must be below config.num_steps=8, got 8"),
        ({"start_step": 1}, {}, "config.adversary.start_step must be above 1, the last step .*, got 1"),
        (
            {"start_step": 4},
            {"codebook.revive_every_steps": 2, "codebook.revive_until_step": 4},
            "config.adversary.start_step must be above 4, the last step at which codes may be redrawn, got 4",
        ),
        (
            {"layers": 3},
            {},
            "images must have at least 24 x 24 pixels for the discriminator, got 12 x 12; take fewer",
        ),
        ({"kind": "gan"}, {}, "config.adversary.kind must be none, patch or dino, got 'gan'"),
        ({"wieght": 1.0}, {}, "unknown key config.adversary.wieght. Did you mean weight"),
        ({"kind": "dino"}, {"data.image_size": 16, "model.sides": (2, 8)}, "config.adversary.file= is missing: "),
        ({}, {"codebook.perceptual_weight": 1.0}, r"config.codebook.perceptual_file= is missing: download vgg16-.*"),
    ],
)
def test_adversary_that_does_not_fit_is_refused(section, changes, words):
    with pytest.raises(InputError, match=f"^{words}"):
        make_task(SECTION | section, **changes)


def test_lpips_refuses_small_images_and_those_with_alpha():
    options = CodebookOptions(perceptual_weight=1.0)
    options.check_images((48, 64, 3))
    for shape in ((47, 64, 3), (64, 64, 4)):
        with pytest.raises(InputError, match=r"^config.codebook.perceptual_weight must be 0 unless images have at "):
            options.check_images(shape)


def test_rematerialised_tokenizer_has_the_same_parameters_and_recomputes_its_blocks():
    model = MODEL.clone(remat=True)
    assert jax.tree.structure(shapes_of(model)) == jax.tree.structure(shapes_of(MODEL))
    loss = lambda model: lambda params: jnp.mean(jnp.square(model.apply({"params": params}, IMAGES)[0] - IMAGES))
    texts = [str(jax.make_jaxpr(jax.grad(loss(m)))(seeded_params(MODEL))) for m in (MODEL, model)]
    assert "remat" not in texts[0] and "remat" in texts[1]
