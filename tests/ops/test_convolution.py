"""The convolution of autoencoder and discriminator beside XLA's own, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices

from mvar_jax.ops import convolution
from mvar_jax.ops.convolution import NUMBERS, convolve
from mvar_jax.ops.platform import compiling_for

CASES = [
    ((2, 12, 10, 128), (3, 3, 128, 130), (1, 1), ((1, 1), (1, 1))),
    ((2, 13, 9, 128), (3, 3, 128, 128), (2, 2), ((0, 0), (0, 0))),  # on a padded map, as Downsample
    ((2, 7, 8, 128), (2, 2, 128, 128), (1, 1), ((1, 0), (0, 1))),  # of UpConv
    ((2, 8, 8, 128), (4, 4, 128, 256), (2, 2), ((1, 1), (1, 1))),  # of the discriminator
    ((1, 6, 6, 64), (1, 1, 64, 384), (1, 1), ((0, 0), (0, 0))),
    ((3, 5, 600, 128), (3, 3, 128, 128), (1, 2), ((1, 1), (1, 1))),  # a row is more than a block
]


def case_of(x_shape, kernel_shape, strides, padding, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, (x_shape, kernel_shape), strict=False)
    )
    of_xla = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NUMBERS)
    ours = lambda x, kernel: convolve(x, kernel, strides, padding)
    grad = jax.random.normal(keys[2], jax.eval_shape(of_xla, x, kernel).shape, dtype)
    return ours, of_xla, x, kernel, grad


def all_of(f, x, kernel, grad):
    y, vjp = jax.vjp(f, x, kernel)
    return y, *vjp(grad)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_xla(case):
    ours, of_xla, *arrays = case_of(*case)
    for found, wanted in zip(all_of(ours, *arrays), all_of(of_xla, *arrays), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_sixteen_bits_are_summed_in_float32():
    ours, of_xla, x, kernel, grad = case_of((4, 64, 64, 128), *CASES[0][1:], dtype="bfloat16")
    wanted = all_of(of_xla, *(a.astype("float32") for a in (x, kernel, grad)))[2]
    found = all_of(ours, x, kernel, grad)[2]
    assert found.dtype == jnp.bfloat16
    error = jnp.abs(found.astype("float32") - wanted).max() / jnp.abs(wanted).max()
    assert error < 2**-8  # that of rounding the sum


@pytest.mark.parametrize(
    ("channels", "platform", "is_by_blocks"), [(128, "cpu", True), (96, "cpu", False), (128, "gpu", False)]
)
def test_kernels_with_many_channels_get_their_gradient_by_blocks_on_a_cpu(channels, platform, is_by_blocks):
    x, kernel = jnp.ones((1, 4, 4, channels)), jnp.ones((3, 3, channels, channels))
    with compiling_for(platform):
        jaxpr = jax.make_jaxpr(jax.grad(lambda k: convolve(x, k, (1, 1), CASES[0][3]).sum()))(kernel)
    assert ("dot_general" in str(jaxpr)) == is_by_blocks


@pytest.mark.parametrize("places", [1, 45, 10**6])
@pytest.mark.parametrize("case", CASES[:4])
def test_the_size_of_blocks_does_not_change_the_sum(monkeypatch, case, places):
    monkeypatch.setattr(convolution, "BLOCK_PLACES", places)
    ours, of_xla, *arrays = case_of(*case)
    found, wanted = all_of(ours, *arrays)[2], all_of(of_xla, *arrays)[2]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_the_precision_of_products_is_that_of_the_convolution():
    x, kernel = jnp.ones((1, 4, 4, 128)), jnp.ones((3, 3, 128, 128))
    at = lambda k: convolve(x, k, (1, 1), CASES[0][3], precision=jax.lax.Precision.HIGHEST).sum()
    jaxpr = str(jax.make_jaxpr(jax.grad(at))(kernel))
    products = jaxpr.count("dot_general[") + jaxpr.count("conv_general_dilated[")
    assert jaxpr.count("dot_general[") == 9
    assert products == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


@pytest.mark.parametrize("options", [{"kernel_dilation": 2}, {"input_dilation": (2, 1)}, {"feature_group_count": 2}])
def test_what_it_does_not_do_is_refused(options):
    layer = nn.Conv(4, (3, 3), conv_general_dilated=convolve, padding=1, **options)
    with pytest.raises(ValueError, match="neither dilation nor groups"):
        layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))


def test_maps_and_kernels_that_lie_on_several_devices_have_the_same_gradient():
    assert float(run_on_eight_devices("convolution_mesh_case.py")) < 1e-5
