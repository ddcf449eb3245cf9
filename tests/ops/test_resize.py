import math

import eval_case
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import assert_close, load

from mvar_jax.ops.resize import area_matrix, bicubic_matrix, resize_area, resize_bicubic, resize_tf1
from mvar_jax.scales import KNOWN_SIDES

GOLDEN = load("interp")


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_resize_matrix_equals_golden(name):
    kind, _, sizes = name.partition("_")
    source, target = (int(size) for size in sizes.split("to"))
    matrix = {"area": area_matrix, "bicubic": bicubic_matrix}[kind](source, target)
    assert matrix.dtype == np.float32
    assert_close(name, matrix, GOLDEN[name], atol=2e-7)


@pytest.mark.parametrize("side", KNOWN_SIDES[1024])
def test_area_average_is_the_mean_of_overlapping_windows_at_1024_px(side):
    x_YX = np.random.default_rng(0).normal(size=(64, 64))
    ours = resize_area(jnp.asarray(x_YX[None, :, :, None], jnp.float32), side)[0, :, :, 0]
    starts = [math.floor(i * 64 / side) for i in range(side)]
    ends = [math.ceil((i + 1) * 64 / side) for i in range(side)]
    expected = [[x_YX[a:b, c:d].mean() for c, d in zip(starts, ends)] for a, b in zip(starts, ends)]  # noqa: B905
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("resize", [resize_area, resize_bicubic])
def test_rows_and_columns_are_resized_alike(resize):
    matrix = {resize_area: area_matrix(7, 4), resize_bicubic: bicubic_matrix(7, 4)}[resize]
    x_BYXc = np.random.default_rng(1).normal(size=(2, 7, 7, 3)).astype(np.float32)
    ours = resize(jnp.asarray(x_BYXc), 4)
    assert ours.shape == (2, 4, 4, 3) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, np.einsum("iy,byxc,jx->bijc", matrix, x_BYXc, matrix), atol=1e-5)


@pytest.mark.parametrize("resize", [resize_area, resize_bicubic])
def test_resize_is_the_identity_at_equal_sizes(resize):
    x_BYXc = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 5, 2)), jnp.float32)
    np.testing.assert_array_equal(resize(x_BYXc, 5), x_BYXc)


@pytest.mark.parametrize("side", KNOWN_SIDES[1024])
def test_upsampling_keeps_constants_and_is_symmetric(side):
    matrix = bicubic_matrix(side, 64)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
    assert (matrix != 0).sum(1).max() <= 4


@pytest.mark.parametrize("size", ["64x64", "256x256", "32x48", "299x299", "320x300"])
def test_tf1_resizing_is_that_of_the_published_evaluator(size):
    """Sampled pixels, the last rows (whose neighbour below does not exist) and the sum of every row, of 0..255."""
    pixels = eval_case.images(f"resize/{size}", 2, *eval_case.sizes_of(size))[1:]
    ours, golden = np.asarray(resize_tf1(jnp.asarray(pixels), 299)), eval_case.load("resize.npz")
    np.testing.assert_allclose(ours[:, ::7, ::5], golden[f"{size}/every_7_5"], atol=3e-4)
    np.testing.assert_allclose(ours[:, -3:, ::5], golden[f"{size}/last_rows"], atol=3e-4)
    np.testing.assert_allclose(ours.sum(2, dtype=np.float64), golden[f"{size}/row_sums"], atol=299 * 3e-4)
    if size == "299x299":
        np.testing.assert_array_equal(ours, pixels)
