import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import WINDOW_ATTENTION, assert_close, load, quick_jit

from mvar_jax.errors import InputError
from mvar_jax.ops.attention import dense_attention
from mvar_jax.ops.window import BACKENDS, choose_backend, local_window_attention
from mvar_jax.ops.window.geometry import window_indices, window_mask

GOLDEN = load("attention")
CASES = {"8x8k3": 3, "13x13k7": 7, "16x16k7": 7, "9x12k5": 5}
SCALES = {"8x8k3": (1.0, 0.25), "13x13k7": (1.0,), "16x16k7": (1.0,), "9x12k5": (1.0, 0.25)}


attend = functools.partial(quick_jit, static_argnames=("window", "backend"))(local_window_attention)


def random_qkv(height, width, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).normal(size=(3, 2, height, width, 2, 4))
    return tuple(jnp.asarray(part, dtype) for part in x)


def keys_seen(height: int, width: int, window: int) -> np.ndarray:
    """bool [Y, X, Y, X] from the definition: rows clip(i - k//2, 0, h-k) .. + k, columns alike."""
    mask = np.zeros((height, width, height, width), bool)
    for i, j in np.ndindex(height, width):
        row = min(max(i - window // 2, 0), height - window)
        column = min(max(j - window // 2, 0), width - window)
        mask[i, j, row : row + window, column : column + window] = True
    return mask


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("case", sorted(CASES))
def test_window_attention_and_its_gradients_equal_golden(case, backend):
    @quick_jit
    def run(q, k, v, cotangent, scale):
        attend = lambda q, k, v: local_window_attention(q, k, v, CASES[case], scale=scale, backend=backend)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    for scale in SCALES[case]:
        results = run(*(GOLDEN[f"{case}/{name}"] for name in ("q", "k", "v", "ct")), scale)
        for name, result in zip(("out", "dq", "dk", "dv"), results, strict=True):
            assert_close(f"{case} {backend} {name}", result, GOLDEN[f"{case}/s{scale}/{name}"], **WINDOW_ATTENTION)


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 3), (9, 12, 5), (7, 7, 7), (13, 13, 7), (4, 6, 1)])
def test_window_is_shifted_not_cut_at_borders(height, width, window):
    expected = keys_seen(height, width, window).reshape(height * width, height * width)
    np.testing.assert_array_equal(window_mask(height, width, window), expected)
    index = window_indices(height, width, window)
    assert index.shape == (height * width, window * window)
    np.testing.assert_array_equal(index, np.stack([np.flatnonzero(row) for row in expected]))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(("height", "width", "window"), [(5, 5, 7), (3, 4, 5), (1, 1, 3)])
def test_map_smaller_than_the_window_is_attended_fully(height, width, window, backend):
    q, k, v = random_qkv(height, width)
    flat = [x.reshape(2, height * width, 2, 4) for x in (q, k, v)]
    expected = dense_attention(*flat).reshape(q.shape)
    np.testing.assert_allclose(attend(q, k, v, window, backend=backend), expected, **WINDOW_ATTENTION)


def test_window_longer_than_one_side_is_cut_to_that_side_only():
    mask = window_mask(3, 9, 5).reshape(3, 9, 3, 9)
    assert (mask.any((0, 2)).sum(-1) == 5).all()
    assert mask.any((1, 3)).all()


@pytest.mark.parametrize(("height", "width", "window"), [(3, 9, 5), (17, 17, 7), (10, 5, 1), (4, 4, 5)])
def test_backends_equal_each_other_forward_and_in_gradients(height, width, window):
    @quick_jit
    def run(q, k, v):
        def run_one(backend):
            attend = lambda *qkv: local_window_attention(*qkv, window, scale=0.6, backend=backend)
            out, pull_back = jax.vjp(attend, q, k, v)
            return out, *pull_back(jnp.cos(out))

        return {backend: run_one(backend) for backend in BACKENDS}

    results = run(*random_qkv(height, width))
    for backend in BACKENDS:
        for ours, theirs in zip(results[backend], results["reference"], strict=True):
            np.testing.assert_allclose(ours, theirs, **WINDOW_ATTENTION, err_msg=backend)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_keys_outside_the_window_have_exactly_no_gradient(backend):
    q, k, v = random_qkv(6, 7)
    seen = keys_seen(6, 7, 3)

    @quick_jit
    def pull_back(k, v):
        attend = lambda k, v: local_window_attention(q[:1], k, v, 3, backend=backend)[0, 2, 5].sum()
        return jax.grad(attend, argnums=(0, 1))(k, v)

    for grad in pull_back(k[:1], v[:1]):
        np.testing.assert_array_equal((np.asarray(grad[0]) != 0).any((-1, -2)), seen[2, 5])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_low_precision_output_keeps_its_type_with_a_float32_softmax(backend):
    qkv = random_qkv(9, 9, dtype=jnp.bfloat16)
    ours = attend(*qkv, 3, backend=backend)
    assert ours.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in qkv), 3, backend="reference")
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.03)


def test_window_attention_works_under_vmap():
    q, k, v = random_qkv(6, 6)
    one = lambda q, k, v: local_window_attention(q[None], k[None], v[None], 3, backend="gather")[0]
    ours, expected = quick_jit(jax.vmap(one))(q, k, v), attend(q, k, v, 3, backend="gather")
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_auto_gathers_only_on_large_maps_that_the_window_does_not_cover():
    assert choose_backend(16, 16, 7) == "reference"
    assert choose_backend(32, 32, 7) == "gather"
    assert choose_backend(32, 32, 33) == "reference"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda q, k, v: (q, k, v, 4), "kernel_size"),
        (lambda q, k, v: (q, k, v, 0), "kernel_size"),
        (lambda q, k, v: (q, k[:, :5], v, 3), "k"),
        (lambda q, k, v: (q, k, v[:1], 3), "v"),
        (lambda q, k, v: (q, k, v.astype(jnp.bfloat16), 3), "v"),
    ],
)
def test_window_attention_refuses_what_does_not_fit(change, field):
    with pytest.raises(InputError, match=f"^{field}="):
        local_window_attention(*change(*random_qkv(6, 6)))


def test_window_attention_refuses_an_unknown_backend():
    with pytest.raises(InputError, match="window_backend='magic'.*gather"):
        local_window_attention(*random_qkv(6, 6), 3, backend="magic")
