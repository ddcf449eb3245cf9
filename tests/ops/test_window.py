import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import WINDOW_ATTENTION, assert_close, load, quick_jit

from benchmarks.window_cases import CASES as TABLE
from mvar_jax.errors import InputError
from mvar_jax.ops.attention import dense_attention
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.window import BACKENDS, choose_backend, local_window_attention, tiled
from mvar_jax.ops.window.geometry import window_indices, window_mask

GOLDEN = load("attention")
CASES = {"8x8k3": 3, "13x13k7": 7, "16x16k7": 7, "9x12k5": 5}
SCALES = {"8x8k3": (1.0, 0.25), "13x13k7": (1.0,), "16x16k7": (1.0,), "9x12k5": (1.0, 0.25)}
BFLOAT16 = {"atol": 0.06, "rtol": 0.03}
KERNELS = ("pallas_gpu", "pallas_tpu")


def run_backend(name, q, k, v, window, scale=1.0):
    """A backend as the dispatch calls it; the kernels of other machines in Pallas' interpreter."""
    if name in KERNELS:
        return BACKENDS[name](q, k, v, window, scale, interpret=True)
    return local_window_attention(q, k, v, window, scale=scale, backend=name)


@functools.partial(quick_jit, static_argnames=("backend", "window", "scale"))
def attend(q, k, v, window, *, backend, scale=1.0):
    return run_backend(backend, q, k, v, window, scale)


@functools.partial(quick_jit, static_argnames=("backend", "window", "scale"))
def attend_and_pull_back(q, k, v, cotangent, window, scale, backend):
    """(out, dq, dk, dv)."""
    out, pull_back = jax.vjp(lambda q, k, v: run_backend(backend, q, k, v, window, scale), q, k, v)
    return out, *pull_back(cotangent)


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
    arrays = [GOLDEN[f"{case}/{name}"] for name in ("q", "k", "v", "ct")]
    # a kernel is compiled anew for each scale, slowly in the interpreter
    for scale in SCALES[case][-1:] if backend in KERNELS else SCALES[case]:
        results = attend_and_pull_back(*arrays, CASES[case], scale, backend)
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


def all_of(case, arrays, scale, backend) -> dict:
    """Return the output by name, and the gradients unless the map is large."""
    if case.height * case.width >= 32 * 32:
        return {"out": attend(*arrays[:3], case.window, backend=backend, scale=scale)}
    results = attend_and_pull_back(*arrays, case.window, scale, backend)
    return dict(zip(("out", "dq", "dk", "dv"), results, strict=True))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_every_backend_equals_the_oracle_forward_and_in_gradients(case):
    """Output, dq, dk and dv of every backend equal those of `reference` in float32, and have the inputs' dtype.

    The table has each kind of map, window and head once. A wrong border, halo, block or padding rule breaks it.
    Of maps from 32 x 32 on only the output is compared: 24 x 24 and 20 x 45 already have several tiles a side.
    """
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.normal(size=case.shape), jnp.float32) for _ in range(4)]
    arrays = [x.astype(case.dtype) for x in exact]
    exact = [x.astype(jnp.float32) for x in arrays]
    scale = case.head_width**-0.5
    expected = all_of(case, exact, scale, "reference")
    tolerance = WINDOW_ATTENTION if case.dtype == "float32" else BFLOAT16
    backends = set(BACKENDS) - {"reference" if case.dtype == "float32" else None}
    if case.height * case.width > 256 or (case.height > 12 and case.dtype == "float32"):
        backends -= {"pallas_tpu"}  # the interpreter is slow there; tests/hardware compiles it for a TPU
    for backend in sorted(backends):
        results = all_of(case, arrays, scale, backend)
        for (name, ours), theirs in zip(results.items(), expected.values(), strict=True):
            assert ours.dtype == jnp.dtype(case.dtype), (backend, name)
            ours = np.asarray(ours, np.float32)
            np.testing.assert_allclose(ours, theirs, **tolerance, err_msg=f"{backend} {name}")


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_keys_outside_the_window_have_exactly_no_gradient(backend):
    q, k, v = random_qkv(6, 7)
    seen = keys_seen(6, 7, 3)

    @quick_jit
    def pull_back(k, v):
        out = lambda k, v: run_backend(backend, q[:1], k, v, 3)[0, 2, 5].sum()
        return jax.grad(out, argnums=(0, 1))(k, v)

    for grad in pull_back(k[:1], v[:1]):
        np.testing.assert_array_equal((np.asarray(grad[0]) != 0).any((-1, -2)), seen[2, 5])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_low_precision_output_keeps_its_type_with_a_float32_softmax(backend):
    qkv = random_qkv(9, 9, dtype=jnp.bfloat16)
    ours = attend(*qkv, 3, backend=backend)
    assert ours.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in qkv), 3, backend="reference")
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_window_attention_works_under_vmap_forward_and_in_gradients(backend):
    """vmap over q and k, with v shared, gives each member's own loss and gradients.

    v is not mapped, so that the batching rule has to broadcast it and to sum nothing into its gradient.
    """
    q, k, v = random_qkv(6, 6)
    q, k = jnp.stack([q, 2 * q, -q]), jnp.stack([k, k, q])

    def loss(q, k, v):
        return jnp.sum(jnp.sin(run_backend(backend, q, k, v, 3)))

    mapped = quick_jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), in_axes=(0, 0, None)))(q, k, v)
    alone = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    for i in range(3):
        one = alone(q[i], k[i], v)
        np.testing.assert_allclose(mapped[0][i], one[0], rtol=1e-5)
        for ours, expected in zip(mapped[1], one[1], strict=True):
            np.testing.assert_allclose(ours[i], expected, atol=1e-5)


@pytest.mark.parametrize("tile", [(1, 1), (2, 5), (3, 3), (8, 8), (100, 2)])
def test_any_tile_gives_the_same_numbers(tile):
    qkv = random_qkv(9, 11)
    ours = quick_jit(lambda *qkv: tiled.attend_tiles(*qkv, 5, 0.7, tile))(*qkv)
    np.testing.assert_allclose(ours, attend(*qkv, 5, backend="reference", scale=0.7), **WINDOW_ATTENTION)


def like(side, dtype="bfloat16", head_width=64):
    return jax.ShapeDtypeStruct((1, side, side, 2, head_width), jnp.dtype(dtype))


def test_auto_is_chosen_for_the_platform_that_a_program_is_compiled_for():
    assert choose_backend(like(13), 7) == "dense"
    assert choose_backend(like(16), 7) == "dense"
    assert choose_backend(like(16), 5) == choose_backend(like(24), 7) == "band"
    assert choose_backend(like(64), 7) == "tiled"
    assert choose_backend(like(64), 65) == "dense"
    with compiling_for("gpu"):
        assert choose_backend(like(16), 7) == choose_backend(like(64), 65) == "pallas_gpu"
        assert choose_backend(like(24, head_width=256), 7) == "band"
    with compiling_for("tpu"):
        assert choose_backend(like(32), 7) == "dense"
        assert choose_backend(like(64), 7) == "pallas_tpu"
        assert choose_backend(like(64, "float16"), 7) == "dense"


def test_auto_says_once_what_it_chose(caplog):
    qkv = random_qkv(7, 8)
    with caplog.at_level("INFO", "mvar_jax.ops.window"):
        for _ in range(2):
            local_window_attention(*qkv, 5)
    assert [record.getMessage() for record in caplog.records] == ["local window 5 on 7 x 8, float32, cpu: dense"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda q, k, v: (q, k, v, 4), "window"),
        (lambda q, k, v: (q, k, v, 0), "window"),
        (lambda q, k, v: (q[0], k[0], v[0], 3), "q"),
        (lambda q, k, v: (q, k[:, :5], v, 3), "k"),
        (lambda q, k, v: (q, k, v[:1], 3), "v"),
        (lambda q, k, v: (q, k, v.astype(jnp.bfloat16), 3), "v"),
    ],
)
def test_window_attention_refuses_what_does_not_fit(change, field):
    with pytest.raises(InputError, match=f"^{field} must ") as caught:
        local_window_attention(*change(*random_qkv(6, 6)))
    assert caught.value.field == field


def test_window_attention_refuses_an_unknown_backend():
    with pytest.raises(InputError, match="^window_backend must be auto or .*gather.*'magic'$"):
        local_window_attention(*random_qkv(6, 6), 3, backend="magic")


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_of_another_machine_is_refused_with_what_would_do(backend):
    with pytest.raises(
        InputError, match=f"window_backend {backend} cannot.*runs on .pu, this is cpu; use auto or .*tiled"
    ):
        local_window_attention(*random_qkv(6, 6), 3, backend=backend)


def test_a_kernel_says_which_arrays_it_cannot_take():
    with compiling_for("gpu"), pytest.raises(InputError, match="head width 256 is above 128; use auto or .*tiled"):
        jax.eval_shape(
            functools.partial(local_window_attention, window=3, backend="pallas_gpu"), *[like(6, head_width=256)] * 3
        )
