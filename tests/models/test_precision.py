"""Which products of float32 an accelerator may round: those that ops/precision.py leaves open; read off jaxprs."""

import functools
import re
from contextlib import nullcontext

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jaxprs import traced
from small_case import MODEL, TOKENIZER, shapes_of

import mvar_jax
from mvar_jax.errors import InputError
from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.models.lpips import lpips_loss
from mvar_jax.models.lpips import shapes as lpips_shapes
from mvar_jax.models.networks import Networks
from mvar_jax.models.refined import phase_hidden, refined_logits
from mvar_jax.models.refiner import Refiner
from mvar_jax.models.tokenizer import factor_codebook
from mvar_jax.ops.adversarial import generator_loss
from mvar_jax.ops.augment import Pass, augment, draw_augmentations
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.precision import TABLE, computing
from mvar_jax.sampling.order import Order
from mvar_jax.sampling.sampler import SampleOptions, sample
from mvar_jax.sharding import MESH_AXES
from mvar_jax.training.codebook_options import CodebookOptions
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.state import make_state
from mvar_jax.training.tokenizer_step import TokenizerRecipe, train_step
from mvar_jax.training.transformer_step import eval_step, phase_loss
from mvar_jax.training.transformer_task import with_input

PRODUCTS = ("dot_general", "conv_general_dilated")
# the modules of the parts "autoencoder", "discriminator" and "blocks"; attention's own products are within "attend"
OPEN = r"PatchDiscriminator\)*/|/decoder/|/encoder/(?!conv_out)|/blocks/(?!.*attend)|/Adaptive/|/head_adaptive/"
OPEN += r"|/block_\d+/(project|proj|ffn)/"  # the refiner's
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
NETWORKS = Networks(TOKENIZER, shapes_of(TOKENIZER), MODEL, shapes_of(MODEL))
REFINER = Refiner(MODEL.sides, vocab_size=16, code_width=4, width=16, num_heads=2)
array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
L, SIDE = MODEL.pyramid.num_tokens, TOKENIZER.image_size
IDS, LABELS, IMAGES = array(2, L, dtype=jnp.int32), array(2, dtype=jnp.int32), array(2, SIDE, SIDE, 3)
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
OPTIONS = SampleOptions(2.0, smooth=True)


def train(networks, ids, labels):
    """Gradients of a phase of each kind, from ids, and the sums of an evaluation."""
    batch = with_input(networks, {"ids": ids, "label": labels})
    model = networks.transformer
    loss = lambda params: sum(phase_loss(model, params, batch, phase)[0] for phase in model.phases()[:2])
    return jax.grad(loss)(networks.params), eval_step(model, networks.params, batch | {"mask": jnp.ones(2)})


def refine(networks, ids, labels, keys):
    """Gradients of the refiner's logits of ids, and ids that it draws."""
    batch = with_input(networks, {"ids": ids, "label": labels})
    phase = networks.transformer.phases()[0]
    hidden = phase_hidden(networks, batch["previous"], labels, phase)
    loss = lambda params: jnp.sum(refined_logits(networks, params, hidden, ids, phase))
    return jax.grad(loss)(networks.refiner_params), sample(networks, labels, keys, OPTIONS, ("ids",))


OPTIMIZER = OptimizerOptions()
CODEBOOK = CodebookOptions(simvq=True, entropy_weight=0.1, entropy_until_step=9, scale_dropout=0.5)
START = lambda: flax.linen.meta.unbox(factor_codebook(TOKENIZER.init_params(jax.random.key(0))))
STATE = jax.eval_shape(lambda: make_state(START, OPTIMIZER, {"hits": jnp.zeros((4, 16))}))


def train_tokenizer(networks, state, images, index):
    """A step of the tokenizer with the codebook E W, the entropy term and scale dropout."""
    recipe = TokenizerRecipe(networks.tokenizer, OPTIMIZER, CODEBOOK)
    return train_step(recipe, state, {"image": images, "index": index}, 0.1, 0.1)


D = PatchDiscriminator(layers=2, width=8)
D_VARIABLES = flax.linen.meta.unbox(jax.eval_shape(lambda: D.init_variables(jax.random.key(0), (16, 16, 3))))


def losses(networks, d_variables, vgg, x):
    """The pixels' gradient of LPIPS and of a discriminator's logits of augmented images."""
    draws = draw_augmentations(0, jnp.arange(2), 0, Pass.FAKE)
    loss = lambda rec: lpips_loss(vgg, rec, x) + generator_loss(D.apply(d_variables, augment(rec, draws)))
    with computing(networks.tokenizer.precision):
        return jax.grad(loss)(x)


# name -> (function of networks and arrays, arrays, number of products that must be exact)
PROGRAMS = {
    "encode": (lambda networks, x: networks.apply_tokenizer(x, method="encode"), (IMAGES,), 20),
    "teacher forcing": (lambda networks, x: networks.apply_tokenizer(x, method="teacher_forcing"), (IDS,), 10),
    "train": (train, (IDS, LABELS), 30),
    "draw": (lambda networks, *rows: sample(networks, *rows, OPTIONS, ("images",)), (LABELS, KEYS), 30),
    "decode": (lambda networks, x: networks.apply_tokenizer(x, method="decode"), (array(2, 5, 5, 4),), 1),
    "refine": (refine, (IDS, LABELS, KEYS), 100),
    "tokenizer": (train_tokenizer, (STATE, array(2, SIDE, SIDE, 3, dtype=jnp.uint8), array(2, dtype=jnp.uint32)), 50),
    "losses": (losses, (D_VARIABLES, lpips_shapes(), array(2, 16, 16, 3)), 40),
}


@functools.lru_cache
def products(name: str, dtype=jnp.float32, precision: str = "standard", remat: str = "dots") -> list[tuple]:
    """Return (equation, scope) of each product of a program."""
    function, arrays, _ = PROGRAMS[name]
    networks = NETWORKS.replace(transformer=MODEL.clone(dtype=dtype, remat=remat))
    if name == "refine":
        networks = networks.replace(refiner=REFINER.clone(dtype=dtype), refiner_params=shapes_of(REFINER))
    networks = networks.with_precision(precision)
    found = [(e, scope) for e, scope in traced(function, networks, *arrays) if e.primitive.name in PRODUCTS]
    assert len(found) > PROGRAMS[name][2]
    return found


def is_rounded(equation) -> bool:
    """Return whether an accelerator may round a product of float32."""
    return all(x.aval.dtype == jnp.float32 for x in equation.invars) and equation.params["precision"] != HIGHEST


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_product_of_float32_is_rounded_unless_the_table_leaves_it_open(name, dtype):
    found = products(name, dtype)
    wrong = [(str(e), scope) for e, scope in found if is_rounded(e) and not re.search(OPEN, f"{scope}/")]
    assert not wrong, wrong[0]
    num_exact = sum(e.params["precision"] == HIGHEST for e, _ in found)
    assert dtype == jnp.bfloat16 or num_exact >= PROGRAMS[name][2]


@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_rounds_no_product_anywhere(name):
    rounded = [scope for e, scope in products(name, precision="exact") if is_rounded(e)]
    assert not rounded, rounded[0]
    if name != "teacher forcing":  # it has none that are open
        assert any(is_rounded(e) for e, _ in products(name))


@pytest.mark.parametrize(("precision", "dtype"), [("standard", jnp.bfloat16), ("exact", jnp.float32)])
def test_operands_of_head_and_word_embedding_have_the_models_dtype_unless_exact(precision, dtype):
    found = products("draw", jnp.bfloat16, precision)
    found = [e for e, scope in found if re.search("/(head|word_embed)/", f"{scope}/")]
    assert len(found) == 2 * len(MODEL.sides) - 1
    for equation in found:
        assert {x.aval.dtype for x in equation.invars} == {jnp.dtype(dtype)}
        assert equation.outvars[0].aval.dtype == jnp.float32


def test_the_head_multiplies_one_row_a_token_since_guidance_comes_before_it():
    heads = [e for e, scope in products("draw") if "/head/" in scope]
    assert [e.invars[0].aval.shape[0] for e in heads] == [2 * area for area in MODEL.pyramid.areas]


def test_an_unknown_precision_is_refused():
    checks = [module.clone(precision="highest").check for module in (MODEL, TOKENIZER)]
    for check in (lambda: NETWORKS.with_precision("highest"), *checks):
        with pytest.raises(InputError, match="^precision must be standard or exact, got 'highest'$"):
            check()


def test_a_model_is_loaded_in_the_precision_that_is_asked_for_and_its_samples_belong_to_it(tiny_model):
    found = []
    for asked in (None, "exact"):
        networks = mvar_jax.load(tiny_model, precision=asked).networks
        order = Order((0,), 1, OPTIONS).identity(networks)
        found.append((networks.tokenizer.precision, networks.transformer.precision, order["dtype"]))
    assert found == [("standard", "standard", "float32"), ("exact", "exact", "float32, exact")]


def test_the_table_has_three_open_parts():
    assert [part for part, precision in TABLE.items() if precision is None] == [
        "autoencoder",
        "discriminator",
        "blocks",
    ]


@pytest.mark.parametrize(("platform", "tensor", "num"), [("gpu", 1, 1), ("gpu", 2, 3), ("cpu", 1, 3), ("tpu", 1, 1)])
def test_queries_keys_and_values_are_products_of_matrices_or_an_einsum_on_a_tpu(platform, tensor, num):
    """One product on a GPU, three if a mesh splits the heads, which the columns of all three mix with whole axes."""
    phase = MODEL.phases()[0]
    run = lambda params, x, labels: MODEL.apply({"params": params}, x, labels, phase)[0]
    mesh = AbstractMesh((1, 1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with compiling_for(platform), use_abstract_mesh(mesh) if tensor > 1 else nullcontext():
        found = traced(run, NETWORKS.params, array(2, 4, 4), LABELS)
    found = [e for e, scope in found if e.primitive.name == "dot_general" and "/project/" in scope]
    assert len(found) == num
    assert {x.aval.ndim for e in found for x in e.invars} == ({3, 4} if platform == "tpu" else {2})


@pytest.mark.parametrize(("remat", "is_kept"), [("dots", True), ("full", False)])
def test_dots_keeps_the_results_of_all_products_with_weights(remat, is_kept):
    scopes = [scope for _, scope in products("train", remat=remat) if "rematted_computation" in scope]
    assert scopes  # those of attention are computed again
    assert is_kept == (not any(scope.endswith("rd,df->rf") for scope in scopes))
