"""Attention kernels that read the raw product of queries, keys and values, in Pallas' interpreter."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit

from mvar_jax.ops import triton_attention
from mvar_jax.ops.attention import block_diagonal_mask, dense_attention, head_scale, normalise_query_key
from mvar_jax.ops.block_diagonal import Segments
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.products import add_bias
from mvar_jax.ops.window.geometry import window_mask
from mvar_jax.ops.window.pallas_gpu import Window

NAMES = ("out", "dqkv", "dq_bias", "dv_bias", "dlog_scale")


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, its mask, and heads; lengths around the blocks of 32 and 64 tokens."""

    rule: Any
    head_width: int
    dtype: str
    num_heads: int = 3

    def __str__(self):
        return f"{type(self.rule).__name__}{self.rule.num_tokens}-{self.head_width}-{self.dtype}"

    @property
    def mask(self) -> np.ndarray:
        if isinstance(self.rule, Segments):
            return block_diagonal_mask(self.rule.lengths)
        return window_mask(self.rule.height, self.rule.width, self.rule.window_y)

    def arrays(self):
        """Return qkv, q_bias, v_bias, log_scale and a cotangent.

        The last head's scale is clipped. There, the last key is the bias of q, so that the logits of queries beyond
        the last token, which are this bias alone, exceed the exponents of float32.
        """
        rng = np.random.default_rng(0)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
        N, H, K = self.rule.num_tokens, self.num_heads, self.head_width
        q_bias, v_bias = np.asarray(jnp.asarray(normal(2, H, K), self.dtype), np.float32)
        qkv = 2 * normal(2, N, 3, H, K)
        qkv[1, -1, 1, 2] = q_bias[2]
        log_scale = np.asarray([np.log(4.0), -0.5, 4.7], np.float32)
        low = lambda x: jnp.asarray(x, self.dtype)
        return low(qkv), jnp.asarray(q_bias), jnp.asarray(v_bias), jnp.asarray(log_scale), low(normal(2, N, H, K))


CASES = [
    Case(Segments((1, 4, 9)), 24, "float32"),
    Case(Segments((1, 4, 9, 16, 25, 36)), 64, "bfloat16"),
    Case(Segments((30, 1, 40)), 96, "float32"),
    Case(Segments((63, 1, 66)), 64, "float32"),
    Case(Window(7, 7, 3, 3), 64, "float32"),
    Case(Window(9, 12, 5, 5), 24, "bfloat16"),
    Case(Window(6, 7, 3, 3), 96, "bfloat16"),
]


def by_layers(mask, qkv, q_bias, v_bias, log_scale):
    """Attend as the layers do without the kernels."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    q, k = normalise_query_key(add_bias(q, q_bias), k, log_scale)
    return dense_attention(q, k, add_bias(v, v_bias), mask)


def by_kernel(rule, qkv, q_bias, v_bias, log_scale):
    return triton_attention.attend_raw(rule, qkv, q_bias, v_bias, head_scale(log_scale), interpret=True)


def pulled_back(attend, *arrays):
    """Return the output and all gradients. arrays: arguments and the output's cotangent."""
    *arrays, cotangent = arrays
    out, pull_back = jax.vjp(attend, *arrays)
    return out, *pull_back(cotangent)


def run_kernel(case):
    return quick_jit(functools.partial(pulled_back, functools.partial(by_kernel, case.rule)))


def run_layers(case):
    return quick_jit(functools.partial(pulled_back, functools.partial(by_layers, case.mask)))


def heads_first(name: str, x) -> np.ndarray:
    """Return rows of numbers, one for each head; one row for all scales, whose gradients may cancel in a head."""
    axis = {"out": 2, "dqkv": 3}.get(name, 0)
    x = np.moveaxis(np.asarray(x, np.float64), axis, 0)
    return x[None] if name == "dlog_scale" else x.reshape(x.shape[0], -1)


def errors_of(results, exact) -> dict[str, np.ndarray]:
    """Return |x - exact| / |exact| of each output and gradient by name, as norms of `heads_first`."""
    errors = {}
    for name, ours, expected in zip(NAMES, results, exact, strict=True):
        ours, expected = heads_first(name, ours), heads_first(name, expected)
        errors[name] = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return errors


def assert_kernels_equal_layers(case):
    arrays = case.arrays()
    ours, layers = run_kernel(case)(*arrays), run_layers(case)
    expected, exact = layers(*arrays), layers(*(x.astype(jnp.float32) for x in arrays))
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    of_layers = errors_of(expected, exact)
    for name, error in errors_of(ours, exact).items():
        limit = 2e-5 if case.dtype == "float32" else np.maximum(1.2 * of_layers[name], 0.01)
        assert (error <= limit).all(), (name, error, limit)
    assert ours[-1][2] == 0 and (ours[-1][:2] != 0).all()  # a clipped scale learns nothing


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_of_the_raw_product_equal_the_layers_in_outputs_and_all_gradients(case):
    """Equal to biases, unit norms and dense attention, each by XLA, and differentiated by it.

    Float32 is exact up to the order of sums. Half precision is as near to the float32 result as the layers are. A
    missing bias, projection or scale, a wrong part of the product or a row beyond the last token breaks it.
    """
    assert_kernels_equal_layers(case)


@pytest.mark.parametrize("case", CASES[1:3] + CASES[-2:], ids=str)
def test_kernels_with_the_shapes_of_other_cards_than_hopper_equal_the_layers(case):
    with compiling_for("gpu", "8.9"):
        assert_kernels_equal_layers(case)


def test_gradients_of_zero_and_tiny_keys_and_queries_are_finite_and_equal_those_of_the_layers():
    """At a norm below 1e-12 the gradient is 1e12 times that of the unit vector, the part along it included."""
    case = CASES[0]
    qkv, q_bias, *others = case.arrays()
    qkv = qkv.at[1, 6, 0, 0].set(-q_bias[0]).at[0, 8, 1, 1].set(0).at[0, 9, 1, 1].set(1e-13)
    ours, expected = (run(case)(qkv, q_bias, *others)[1] for run in (run_kernel, run_layers))
    for place in ((1, 6, 0, 0), (0, 8, 1, 1), (0, 9, 1, 1)):
        assert np.abs(expected[place]).max() > 1e9
        np.testing.assert_allclose(ours[place], expected[place], rtol=1e-3, atol=1e-5 * np.abs(expected[place]).max())
    rest = np.abs(np.asarray(expected)) < 1e6
    np.testing.assert_allclose(ours[rest], expected[rest], atol=1e-3)


@pytest.mark.parametrize(
    "mapped", [(0, None, None, None), (0, None, 0, 0)], ids=["product", "product and parameters"]
)
def test_vmap_gives_each_member_its_own_output_and_gradients(mapped):
    case = CASES[0]
    *arrays, cotangent = case.arrays()
    loss = lambda *arrays: jnp.sum(by_kernel(case.rule, *arrays) * cotangent)
    pull = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    stacked = [x if axis is None else jnp.stack([x, 0.5 * x]) for x, axis in zip(arrays, mapped, strict=True)]
    together = quick_jit(jax.vmap(pull, in_axes=mapped))(*stacked)
    alone = quick_jit(pull)
    for i in range(2):
        one = alone(*(x if axis is None else x[i] for x, axis in zip(stacked, mapped, strict=True)))
        np.testing.assert_allclose(together[0][i], one[0], rtol=1e-4)
        for ours, expected in zip(together[1], one[1], strict=True):
            np.testing.assert_allclose(ours[i], expected, atol=1e-4)
