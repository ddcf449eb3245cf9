"""The decoder that makes images of samples: its dtype, its chunks, and how far float16 moves a pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import MVAR, load, quick_jit
from golden_case import TOKENIZER as GOLDEN_TOKENIZER
from jaxprs import traced
from small_case import MODEL, TOKENIZER, seeded_params, shapes_of

from mvar_jax.models.autoencoder import GroupNorm, UpConv
from mvar_jax.models.networks import Networks
from mvar_jax.ops.platform import compiling_for
from mvar_jax.sampling import sampler

LOW = MODEL.clone(dtype=jnp.bfloat16)
NETWORKS = Networks(TOKENIZER, shapes_of(TOKENIZER), LOW, shapes_of(MODEL))
MAPS = jax.ShapeDtypeStruct((4, 5, 5, 4), jnp.float32)


def trace(networks: Networks, platform: str) -> list[tuple]:
    with compiling_for(platform):
        return traced(lambda *arguments: sampler.decode_in_chunks(*arguments), networks, MAPS)


def operands(found: list[tuple], scope: str) -> set[str]:
    """Return the dtypes of what is multiplied within the modules of a name."""
    products = [(e, inside) for e, inside in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
    return {x.aval.dtype.name for e, inside in products if scope in inside for x in e.invars}


@pytest.mark.parametrize(
    ("platform", "networks", "dtype"),
    [
        ("gpu", NETWORKS, "float16"),
        ("gpu", NETWORKS.with_precision("exact"), "float32"),
        ("gpu", NETWORKS.replace(transformer=MODEL), "float32"),
        ("gpu", Networks(TOKENIZER, NETWORKS.tokenizer_params), "float32"),
        ("gpu", Networks(TOKENIZER.clone(dtype=jnp.bfloat16), NETWORKS.tokenizer_params), "float16"),
        ("cpu", NETWORKS, "float32"),
        ("tpu", NETWORKS, "float32"),
        ("cpu", NETWORKS.replace(tokenizer=TOKENIZER.clone(dtype=jnp.bfloat16)), "bfloat16"),
    ],
)
def test_a_bfloat16_model_decodes_in_float16_on_a_gpu_unless_exact(platform, networks, dtype):
    found = trace(networks, platform)
    assert operands(found, "/decoder") == {dtype}
    assert operands(found, "/post_quant_conv") == {"float32"}


def test_moments_and_softmax_of_a_float16_decoder_are_float32():
    found = trace(NETWORKS, "gpu")
    sensitive = {"exp", "rsqrt", "reduce_sum", "reduce_max", "div", "logistic"}
    used = [e for e, scope in found if e.primitive.name in sensitive]
    assert {"exp", "rsqrt", "reduce_sum", "logistic"} <= {e.primitive.name for e in used}
    assert {x.aval.dtype.name for e in used for x in (*e.invars, *e.outvars)} == {"float32"}


def test_kernels_are_cast_outside_the_loops_over_images(monkeypatch):
    monkeypatch.setitem(sampler.DECODER_BYTES, "gpu", 0)
    found = trace(NETWORKS, "gpu")
    assert sum(e.primitive.name == "scan" for e, _ in found) == 1
    casts = [e for e, scope in found if e.primitive.name == "convert_element_type" and "/decoder" in scope]
    # those of UpConv's sums of taps are few and small; a kernel has the sizes of a window first
    wide = [e for e in casts if e.invars[0].aval.shape[:2] == (3, 3) and e.outvars[0].aval.dtype == jnp.float16]
    assert casts and not wide


@pytest.mark.parametrize(("num_maps", "sizes"), [(1, [4, 1]), (2, [4, 2]), (5, [4])])
def test_each_stage_takes_as_many_images_as_fit_the_budget(monkeypatch, num_maps, sizes):
    monkeypatch.setitem(
        sampler.DECODER_BYTES, "gpu", num_maps * sampler.MAPS_HELD * TOKENIZER.clone(dtype=jnp.float16).stage_bytes(1)
    )
    found = [e for e, scope in trace(NETWORKS, "gpu") if e.primitive.name == "conv_general_dilated"]
    seen = [e.invars[0].aval.shape[0] for e in found]
    assert list(dict.fromkeys(seen)) == sizes


def test_images_are_the_same_in_chunks_of_any_size(monkeypatch):
    networks = Networks(TOKENIZER, seeded_params(TOKENIZER))
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5, 5, 4)), jnp.float32)
    images = []
    for num_maps in (2, 100):
        monkeypatch.setitem(sampler.DECODER_BYTES, "cpu", num_maps * sampler.MAPS_HELD * TOKENIZER.stage_bytes(1))
        images.append(quick_jit(lambda *arguments: sampler.decode_in_chunks(*arguments))(networks, maps))
    np.testing.assert_allclose(*images, atol=1e-5)


def test_float16_moves_no_pixel_of_the_golden_images_by_more_than_two_levels(tokenizer_params, decode):
    """The mean is 0.12 levels; in bfloat16 the worst would be 13 and the mean 1."""
    f_hat = jnp.asarray(load("tokenizer")["f_hat_scales"][-1, :1].transpose(0, 2, 3, 1))
    networks = Networks(GOLDEN_TOKENIZER, tokenizer_params, MVAR.clone(dtype=jnp.bfloat16))
    with compiling_for("gpu"):
        images = quick_jit(lambda *arguments: sampler.decode_in_chunks(*arguments))(networks, f_hat)
    error = 127.5 * np.abs(np.asarray(images) - decode(f_hat))
    assert 0 < error.max() <= 2 and error.mean() <= 0.2


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_upsampling_convolution_equals_upsampling_and_a_convolution(platform):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    module = UpConv(6, jnp.float32)
    rng = np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(3, 3, 5, 6)).astype(np.float32), "bias": np.arange(6, dtype=np.float32)}
    with compiling_for(platform):
        y = module.apply({"params": params}, x)
    large = x.repeat(2, axis=1).repeat(2, axis=2)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(large, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    np.testing.assert_allclose(y, expected + params["bias"], atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_one_pass_gives_the_moments_of_two(mean):
    x = (mean + np.random.default_rng(0).normal(size=(2, 8, 8, 6))).astype(np.float32)
    x[..., 3:] *= 2
    two, one = (GroupNorm(2, None, jnp.float32, one_pass) for one_pass in (False, True))
    params = {"params": {"scale": np.full(6, 1.5, np.float32), "bias": np.full(6, 0.5, np.float32)}}
    np.testing.assert_allclose(one.apply(params, x), two.apply(params, x), atol=1e-4)
