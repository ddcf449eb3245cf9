import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit

from mvar_jax.ops import triton_attention
from mvar_jax.ops.attention import block_causal_mask, block_diagonal_mask, dense_attention, normalise_query_key
from mvar_jax.ops.block_diagonal import Segments, block_diagonal_attention, group_scales
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.window import local_window_attention
from mvar_jax.scales import KNOWN_SIDES

AREAS_256 = tuple(side**2 for side in KNOWN_SIDES[256])
COARSE_512 = tuple(side**2 for side in KNOWN_SIDES[512][:7])


def random_qkv(num_tokens: int, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(3, 2, num_tokens, 2, 8))
    return tuple(jnp.asarray(part, jnp.float32) for part in x)


def attend_by_loops(q, k, v, is_seen, scale):
    out = np.zeros(q.shape)
    for b, n, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(is_seen[n])
        logits = scale * np.asarray(k, np.float64)[b, keys, h] @ np.asarray(q, np.float64)[b, n, h]
        weights = np.exp(logits - logits.max())
        out[b, n, h] = weights / weights.sum() @ np.asarray(v, np.float64)[b, keys, h]
    return out


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("make_mask", [block_diagonal_mask, block_causal_mask])
def test_masked_attention_is_the_softmax_over_the_keys_seen(make_mask, scale):
    areas = (1, 4, 9)
    q, k, v = random_qkv(14)
    ours = dense_attention(q, k, v, make_mask(areas), scale)
    level = [0] + [1] * 4 + [2] * 9
    see = (lambda n, m: m == n) if make_mask is block_diagonal_mask else (lambda n, m: m <= n)
    is_seen = np.array([[see(n, m) for m in level] for n in level])
    np.testing.assert_allclose(ours, attend_by_loops(q, k, v, is_seen, scale), atol=2e-6)


@pytest.mark.parametrize(
    "areas", [(1,), (1, 4, 9), (200,), (90, 5, 2, 120, 1), (96, 1), AREAS_256[:8], COARSE_512, (1, 4, 100, 121, 3)]
)
def test_grouped_block_diagonal_attention_equals_the_masked_one(areas):
    q, k, v = random_qkv(sum(areas))

    @quick_jit
    def run(q, k, v):
        masked = dense_attention(q, k, v, block_diagonal_mask(areas), scale=0.7)
        return block_diagonal_attention(q, k, v, areas, scale=0.7), masked

    ours, expected = run(q, k, v)
    np.testing.assert_allclose(ours, expected, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("areas", [(1,), (9,), (1, 4, 9), (63, 1, 64, 2), (192,), AREAS_256[:8]], ids=str)
def test_kernels_attend_within_segments_and_their_gradients_equal_the_masked_ones(areas, dtype):
    arrays = [x.astype(dtype) for x in (*random_qkv(sum(areas)), random_qkv(sum(areas), 1)[0])]

    @quick_jit
    def run(q, k, v, cotangent):
        by_kernel = lambda q, k, v: triton_attention.attend(Segments(areas), q, k, v, 0.7, interpret=True)
        masked = lambda q, k, v: dense_attention(q, k, v, block_diagonal_mask(areas), scale=0.7)
        (ours, pull_ours), (out, pull) = jax.vjp(by_kernel, q, k, v), jax.vjp(masked, q, k, v)
        return (ours, *pull_ours(cotangent)), (out, *pull(cotangent))

    tolerance = {"atol": 2e-5} if dtype == jnp.float32 else {"atol": 0.06, "rtol": 0.03}
    for ours, expected in zip(*run(*arrays), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), **tolerance)


@pytest.mark.parametrize(
    ("platform", "dtype", "uses_kernel"), [("gpu", "bfloat16", 1), ("gpu", "float32", 0), ("cpu", "bfloat16", 0)]
)
def test_only_half_precision_on_a_gpu_attends_by_the_kernels(platform, dtype, uses_kernel):
    x = jax.ShapeDtypeStruct((2, 14, 2, 64), dtype)
    with compiling_for(platform):
        jaxpr = jax.make_jaxpr(lambda q, k, v: block_diagonal_attention(q, k, v, (1, 4, 9)))(x, x, x)
    assert str(jaxpr).count("pallas_call") == uses_kernel


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_attention_on_a_gpu_is_that_of_cudnn(dtype):
    """Its backward pass gives NaN for 192 keys with a mask, if a query's log-sum-exp is very negative."""
    x, maps = (jax.ShapeDtypeStruct((2, *shape, 2, 64), dtype) for shape in ((192,), (16, 16)))
    attends = (
        (x, lambda *qkv: dense_attention(*qkv, block_causal_mask((64, 128)))),
        (x, lambda *qkv: block_diagonal_attention(*qkv, (64, 128))),
        (maps, lambda *qkv: local_window_attention(*qkv, 7)),
        (maps, lambda *qkv: local_window_attention(*qkv, 7, backend="dense")),
    )
    for like, attend in attends:
        with compiling_for("gpu"):
            text = str(jax.make_jaxpr(jax.grad(lambda *qkv, attend=attend: attend(*qkv).sum()))(like, like, like))
        assert re.search("exp|pallas_call", text) and not re.search("cudnn|dot_product_attention|fmha", text)


@pytest.mark.parametrize("areas", [(1,), AREAS_256, COARSE_512, (200, 1, 300)])
def test_groups_hold_the_scales_in_order(areas):
    groups = group_scales(areas)
    assert sum(groups, ()) == areas
    assert all(groups)


def test_removed_keys_get_exactly_no_gradient():
    areas = (1, 4, 9)
    q, k, v = random_qkv(14)
    out_of_scale_1 = lambda k, v: jnp.sum(jnp.square(block_diagonal_attention(q, k, v, areas)[:, 1:5]))
    for grad in quick_jit(jax.grad(out_of_scale_1, argnums=(0, 1)))(k, v):
        assert (np.asarray(grad[:, 1:5]) != 0).any(-1).all()
        np.testing.assert_array_equal(grad[:, :1], 0)
        np.testing.assert_array_equal(grad[:, 5:], 0)


def test_query_and_key_are_normalised_and_the_query_scaled():
    q, k, _ = random_qkv(5)
    log_scale_H = jnp.asarray([np.log(4.0), -1.0], jnp.float32)
    new_q, new_k = normalise_query_key(q, k, log_scale_H)
    np.testing.assert_allclose(jnp.linalg.norm(new_k, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(new_q, axis=-1), np.tile([4, np.exp(-1)], (2, 5, 1)), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(new_q * q, -1), jnp.linalg.norm(q, axis=-1) * jnp.exp(log_scale_H), rtol=1e-5)


def test_query_scale_is_clamped_at_100_and_learns_nothing_beyond():
    q, k, _ = random_qkv(5)
    size = lambda log_scale_H: jnp.sum(jnp.linalg.norm(normalise_query_key(q, k, log_scale_H)[0], axis=-1), (0, 1))
    log_scale_H = jnp.asarray([4.7, 4.5], jnp.float32)
    np.testing.assert_allclose(size(log_scale_H), [10 * 100, 10 * np.exp(4.5)], rtol=1e-5)
    slope_H = quick_jit(jax.grad(lambda s: jnp.sum(size(s))))(log_scale_H)
    assert slope_H[0] == 0 and slope_H[1] > 0


def test_zero_vectors_stay_zero_and_differentiable():
    zero = jnp.zeros((1, 1, 1, 4))
    norm = lambda x: jnp.sum(normalise_query_key(x, x, jnp.zeros(1))[0])
    value, grad = quick_jit(jax.value_and_grad(norm))(zero)
    assert value == 0 and np.isfinite(grad).all()


def test_low_precision_inputs_keep_their_type_and_softmax_stays_exact():
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(30))
    q, k = normalise_query_key(q, k, jnp.zeros(2))
    assert q.dtype == k.dtype == jnp.bfloat16
    ours = dense_attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    exact = dense_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.01)
