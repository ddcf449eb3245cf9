"""Attention kernels that read the raw product of queries, keys and values, in Pallas' interpreter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit

from mvar_jax.ops import triton_attention
from mvar_jax.ops.attention import block_diagonal_mask, dense_attention, head_scale, normalise_query_key
from mvar_jax.ops.block_diagonal import Segments
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

        One key is zero and one query is minus its bias: their norms are 0. The last head's scale is clipped.
        """
        rng = np.random.default_rng(0)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
        N, H, K = self.rule.num_tokens, self.num_heads, self.head_width
        q_bias, v_bias = np.asarray(jnp.asarray(normal(2, H, K), self.dtype), np.float32)
        qkv = 2 * normal(2, N, 3, H, K)
        qkv[1, N // 2, 0, 0] = -q_bias[0]
        qkv[0, N // 2, 1, 1] = 0
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_of_the_raw_product_equal_the_layers_in_outputs_and_all_gradients(case):
    """Equal to biases, unit norms and dense attention, each by XLA, and differentiated by it.

    The gradients of float32 arrays are exact up to the order of sums; where a norm is 0 they are 1e12 times those of
    the logits. A missing bias, projection or scale, a wrong part of the product or a row beyond the last token breaks
    it.
    """
    *arrays, cotangent = case.arrays()

    @quick_jit
    def run(cotangent, *arrays):
        attends = (lambda *x: by_kernel(case.rule, *x)), (lambda *x: by_layers(case.mask, *x))
        pulls = [jax.vjp(attend, *arrays) for attend in attends]
        return [(out, *pull_back(cotangent)) for out, pull_back in pulls]

    zeros = np.zeros(arrays[0].shape, bool)
    N = case.rule.num_tokens
    zeros[1, N // 2, 0, 0] = zeros[0, N // 2, 1, 1] = True
    for name, ours, expected in zip(NAMES, *run(cotangent, *arrays), strict=True):
        assert ours.dtype == expected.dtype, name
        ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
        if name == "dqkv":
            assert (np.abs(expected[zeros]).max() > 1e6) and np.isfinite(ours).all()
            np.testing.assert_allclose(ours[zeros], expected[zeros], rtol=0.03, atol=1e10)
            ours, expected = ours[~zeros], expected[~zeros]
        if name == "dq_bias":  # the query of norm 0 dominates its head
            ours, expected = ours[1:], expected[1:]
        print(name, np.abs(ours-expected).max(), np.abs(expected).max())
        tolerance = {"atol": 2e-5, "rtol": 2e-5} if case.dtype == "float32" else {"atol": 0.06, "rtol": 0.03}
        np.testing.assert_allclose(ours, expected, **tolerance, err_msg=name)
    assert ours[2] == 0 and np.all(ours[:2] != 0)
