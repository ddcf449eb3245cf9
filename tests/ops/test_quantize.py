import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import load_json, quick_jit

from mvar_jax.ops.quantize import (
    decode_ids,
    encode_residual,
    nearest_code,
    next_input,
    phi_index,
    teacher_forcing_input,
)
from mvar_jax.ops.resize import resize_area, resize_bicubic

SIDES = (1, 3, 4)
RNG = np.random.default_rng(0)
CODEBOOK = jnp.asarray(RNG.normal(size=(32, 4)) * RNG.uniform(0.2, 3, (32, 1)), jnp.float32)
F = jnp.asarray(RNG.normal(size=(2, 4, 4, 4)), jnp.float32)


def halve(scale: int, x_BYXc):
    """A phi whose effect shows which scale it was asked for."""
    return x_BYXc * (0.5 + 0.1 * scale)


@functools.partial(quick_jit, static_argnums=2)
def encode(f, codebook, znorm=False):
    return encode_residual(f, codebook, halve, SIDES, znorm)


def test_nearest_code_is_the_nearest_by_squared_distance():
    x_BNc = F.reshape(2, 16, 4)
    distances = np.square(np.asarray(x_BNc)[:, :, None] - np.asarray(CODEBOOK)).sum(-1)
    ids = nearest_code(x_BNc, CODEBOOK)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, distances.argmin(-1))


def test_znorm_picks_the_smallest_angle():
    x_BNc = np.asarray(F.reshape(2, 16, 4))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    ids = nearest_code(jnp.asarray(x_BNc), CODEBOOK, znorm=True)
    np.testing.assert_array_equal(ids, (unit(x_BNc) @ unit(np.asarray(CODEBOOK)).T).argmax(-1))
    assert (ids != nearest_code(jnp.asarray(x_BNc), CODEBOOK)).any()
    assert (nearest_code(3.7 * x_BNc, 0.2 * CODEBOOK, znorm=True) == ids).all()


@pytest.mark.parametrize("znorm", [False, True])
def test_encoding_follows_the_residual_scale_by_scale(znorm):
    encoded = encode(F, CODEBOOK, znorm)
    rest, f_hat, begin = F, jnp.zeros_like(F), 0
    for scale, side in enumerate(SIDES):
        pooled = resize_area(rest, side).reshape(2, side * side, 4)
        ids = encoded.ids_BL[:, begin : begin + side * side]
        np.testing.assert_array_equal(ids, nearest_code(pooled, CODEBOOK, znorm))
        # codewords themselves are added: znorm is for the search only
        update = halve(scale, resize_bicubic(CODEBOOK[ids].reshape(2, side, side, 4), 4))
        f_hat, rest, begin = f_hat + update, rest - update, begin + side * side
        np.testing.assert_allclose(encoded.f_hats[scale], f_hat, atol=1e-5)
        np.testing.assert_allclose(encoded.rests[scale], pooled, atol=1e-5)


def test_decoding_ids_gives_the_encoders_f_hat():
    encoded = encode(F, CODEBOOK)
    f_hats = quick_jit(lambda ids_BL: decode_ids(ids_BL, CODEBOOK, halve, SIDES))(encoded.ids_BL)
    for ours, expected in zip(f_hats, encoded.f_hats, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_teacher_forcing_input_is_the_next_input_of_each_scale():
    f_hats = encode(F, CODEBOOK).f_hats
    whole = teacher_forcing_input(f_hats, SIDES)
    assert whole.shape == (2, 9 + 16, 4)
    np.testing.assert_array_equal(whole[:, :9], next_input(f_hats[0], 0, SIDES))
    np.testing.assert_array_equal(whole[:, 9:], next_input(f_hats[1], 1, SIDES))
    np.testing.assert_allclose(whole[:, :9], resize_area(f_hats[0], 3).reshape(2, 9, 4), atol=1e-6)


def test_gradients_reach_the_codebook_and_not_f():
    def loss_fn(f, codebook):
        return sum(jnp.sum(jnp.square(f_hat)) for f_hat in encode_residual(f, codebook, halve, SIDES).f_hats)

    f_grad, codebook_grad = quick_jit(jax.grad(loss_fn, argnums=(0, 1)))(F, CODEBOOK)
    np.testing.assert_array_equal(f_grad, 0)
    used = np.unique(encode(F, CODEBOOK).ids_BL)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(codebook_grad).sum(1)), used)


def test_phi_index_equals_golden():
    assert list(phi_index(10, 4)) == load_json("tiny/meta.json")["phi_index_per_scale"]


@pytest.mark.parametrize("num_scales", [4, 5, 10, 14])
def test_phi_index_is_one_phi_for_all_or_one_for_each(num_scales):
    assert phi_index(num_scales, 1) == (0,) * num_scales
    assert phi_index(num_scales, num_scales) == tuple(range(num_scales))


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "expected"),
    [
        (10, 2, (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)),
        (9, 3, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
        (10, 5, (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)),
        (14, 4, (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)),
        (1, 1, (0,)),
    ],
)
def test_phi_index_is_the_nearest_tick(num_scales, num_phi, expected):
    assert phi_index(num_scales, num_phi) == expected
