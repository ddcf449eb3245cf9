"""Discriminators and the perceptual loss, against golden numbers of a plain PyTorch program."""

import eval_case
import flax.linen
import flax.traverse_util
import jax
import jax.numpy as jnp
import loss_case
import numpy as np
import pytest
import torch_files
from golden_case import assert_close, assert_gradients_close, quick_jit
from loss_case import DISCRIMINATOR, MEANS, WEIGHTS

from mvar_jax.__main__ import main
from mvar_jax.errors import InputError
from mvar_jax.evaluation.dino_weights import convert_dino, load_dino
from mvar_jax.evaluation.lpips import params_of_torch
from mvar_jax.models.dino import DinoDiscriminator, SpectralConv, dino_features
from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.models.lpips import lpips_loss, shapes
from mvar_jax.ops.adversarial import LogitMeans, adaptive_weight, discriminator_loss, generator_loss, lecam_loss

GOLDEN = loss_case.load("loss")
REC = np.moveaxis(GOLDEN["rec"], 1, -1).astype(np.float32)
LOGITS = {"atol": 1e-5}


@quick_jit
def judge(params, real, fake):
    """(loss of D, logits of both), and the gradient."""

    def loss(params):
        logits = [DISCRIMINATOR.apply({"params": params}, x) for x in (real, fake)]
        means = LogitMeans(**{name: jnp.float32(x) for name, x in MEANS.items()})
        return discriminator_loss(*logits) + WEIGHTS["lecam"] * lecam_loss(*logits, means), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_patch_discriminator_and_its_loss_with_lecam_equal_pytorch():
    (loss, (real, fake)), grads = judge(loss_case.discriminator_params(), loss_case.pixels(), REC)
    assert_close("real", real, GOLDEN["real"], **LOGITS)
    assert_close("fake", fake, GOLDEN["fake"], **LOGITS)
    assert_close("loss", loss, GOLDEN["discriminator"], rtol=1e-5)
    assert_close("hinge", discriminator_loss(real, fake), GOLDEN["hinge"], rtol=1e-5)
    assert_close("adversarial", generator_loss(fake), GOLDEN["adversarial"], rtol=1e-4)
    tolerance = {"rtol": 1e-3, "atol": 1e-6}
    assert_gradients_close("D", loss_case.published_discriminator(grads), GOLDEN, "d_grad", tolerance)


def test_the_adaptive_weight_is_the_quotient_of_norms_within_its_bounds():
    one = jnp.full((3, 3), 1.0)
    found = [adaptive_weight(a * one, b * one) for a, b in ((2, 1), (0, 1), (1, 0))]
    np.testing.assert_allclose(found, [2, 0.015, 1e4], rtol=1e-5)


def test_means_of_logits_move_by_their_decay_and_stop_the_gradient():
    move = lambda x: LogitMeans.zeros().updated(x, -x, 0.9)
    means = move(jnp.full((2, 3), 2.0))
    np.testing.assert_allclose([means.real, means.fake], [0.2, -0.2], rtol=1e-6)
    assert not jax.grad(lambda x: move(x).real)(jnp.ones((2, 3))).any()


def test_perceptual_loss_equals_pytorch_and_reaches_the_reconstruction_alone(tmp_path):
    files = tmp_path / "vgg.pth", tmp_path / "heads.pth"
    for path, state in zip(files, (eval_case.vgg_state(), eval_case.heads_state()), strict=True):
        torch_files.save(path, state)
    loss = quick_jit(jax.value_and_grad(lpips_loss, argnums=(1, 2)))
    value, (to_rec, to_image) = loss(params_of_torch(*files), REC, loss_case.pixels())
    assert_close("lpips", value, GOLDEN["perceptual"], rtol=1e-5)
    assert np.abs(to_rec).max() > 0 and not np.asarray(to_image).any()


def test_perceptual_loss_has_a_gradient_where_all_features_are_zero():
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes())
    image = jnp.ones((1, 16, 16, 3))
    grads = quick_jit(jax.grad(lpips_loss, argnums=1))(zeros, image, image)
    assert np.isfinite(grads).all()


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(variables with weights by the formula, logits, moved vectors, gradient at the pixels)."""
    folder, module = tmp_path_factory.mktemp("dino"), DinoDiscriminator()
    torch_files.save(folder / "dino.pth", loss_case.dino_state())
    assert main(["convert", "--dino", str(folder / "dino.pth"), "--out", str(folder / "dino.npz")]) == 0
    frozen = dict(load_dino(folder / "dino.npz").params)
    state = loss_case.head_state(loss_case.head_shapes(module))
    flat = {tuple(name.split("/")): x for name, x in state.items()}
    vectors = {name: x / np.linalg.norm(x) for name, x in flat.items() if name[-1] == "u"}
    variables = {"params": {name: x for name, x in flat.items() if name[-1] != "u"}, "spectral": vectors}
    variables = {name: flax.traverse_util.unflatten_dict(x) for name, x in variables.items()}

    def run(variables, frozen, x):
        logits = lambda x: module.apply({**variables, "frozen": {"vit": frozen}}, x)
        return logits(x), jax.grad(lambda x: logits(x).sum())(x)

    x = jnp.asarray(loss_case.dino_images())
    optimized = {"xla_backend_optimization_level": 3}  # 200 s otherwise with jax 0.10
    return variables, frozen, jax.jit(run, compiler_options=optimized)(variables, frozen, x)


def test_dino_discriminator_and_its_gradient_at_the_pixels_equal_pytorch(dino):
    golden, (logits, slope) = loss_case.load("dino"), dino[2]
    assert_close("logits", logits, golden["logits"], rtol=1e-3, atol=1e-3)
    assert_close("slope", slope, golden["slope"], rtol=1e-2, atol=1e-3 * np.abs(golden["slope"]).max())


def test_vectors_of_the_spectral_norm_move_only_if_they_may_and_towards_the_largest_singular_value():
    module, x = SpectralConv(4, 3, jnp.float32), jnp.ones((1, 9, 5))
    variables = flax.linen.meta.unbox(module.init(jax.random.key(0), x))
    assert not module.apply(variables, x, mutable=["other"])[1]
    for _ in range(60):
        y, moved = module.apply(variables, x, mutable=["spectral"])
        variables = {**variables, **moved}
    kernel = variables["params"]["kernel"]
    largest = np.linalg.svd(np.reshape(kernel, (-1, 4)), compute_uv=False)[0]
    expected = np.asarray(kernel).sum((0, 1)) / largest
    np.testing.assert_allclose(y[0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (PatchDiscriminator(), (23, 40, 3), "images must have at least 24 x 24 pixels .* got 23 x 40; take fewer"),
        (PatchDiscriminator(layers=2), (11, 11, 1), "at least 12 x 12 pixels"),
        (DinoDiscriminator(), (15, 64, 3), "at least 16 x 16 pixels"),
        (
            DinoDiscriminator(),
            (64, 64, 1),
            "images must have 3 channels for DINO, got 1; use the patch",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(module, shape, message):
    with pytest.raises(InputError, match=message):
        module.init_variables(jax.random.key(0), shape)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_least_side_leaves_one_logit(layers):
    module = PatchDiscriminator(layers, 4)
    side = module.min_side
    make = lambda: module.init_variables(jax.random.key(0), (side, side, 1))
    variables = flax.linen.meta.unbox(jax.eval_shape(make))
    image = jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32)
    assert jax.eval_shape(module.apply, variables, image).shape == (2, 1)


@pytest.mark.parametrize(("grid", "num_wrong"), [(14, 1), (7, 0)])
def test_a_dino_file_of_other_shapes_is_refused_unless_its_grid_of_positions_is_square(tmp_path, grid, num_wrong):
    state = dict(loss_case.dino_state())
    state["pos_embed"] = np.ones((1, 1 + grid**2, 384), np.float32)
    if num_wrong:
        state["patch_embed.proj.weight"] = np.zeros((384, 3, 8, 8), np.float32)
    torch_files.save(tmp_path / "dino.pth", state)
    if num_wrong:
        with pytest.raises(InputError, match="weights: 1 do not fit: patch_embed.proj.weight"):
            convert_dino(tmp_path / "dino.pth", tmp_path / "dino.npz")
        assert not (tmp_path / "dino.npz").exists()
    else:
        positions = convert_dino(tmp_path / "dino.pth", tmp_path / "dino.npz").params["positions"]
        np.testing.assert_allclose(positions, np.ones((197, 384)), rtol=1e-5)


def test_features_are_read_after_the_embedding_and_four_blocks(dino):
    x = jnp.zeros((1, 224, 224, 3))
    assert jax.eval_shape(dino_features, dino[1], x).shape == (5, 1, 196, 384)
