"""Attention within each scale of a phase (scale-Markov): by the Triton kernels on CUDA, else in a few products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mvar_jax.ops.attention import block_diagonal_mask, dense_attention
from mvar_jax.ops.platform import current_platform
from mvar_jax.scales import offsets_of

# Below this many tokens one masked product is cheaper than several small ones.
GROUP_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Segments:
    """The rule of consecutive segments of these lengths: a query sees the keys of its own."""

    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def is_seen(self, query_Q, key_K):
        number = lambda token: count_true([token >= after for after in offsets_of(self.lengths)[1:]])
        return (number(query_Q)[:, None] == number(key_K)[None]) & (key_K < self.num_tokens)[None]

    def keys_of(self, begin, end):
        begins, ends = offsets_of(self.lengths)[:-1], offsets_of(self.lengths)[1:]
        first = count_true([begin >= after for after in ends], self.lengths)
        last = count_true([end > before for before in begins], self.lengths)
        return first, last

    def queries_of(self, begin, end):
        return self.keys_of(begin, end)


def count_true(conditions: list, weights: tuple[int, ...] | None = None):
    """Return the sum of the weights, 1 if there are none, of the conditions that hold, int32."""
    numbers = [condition.astype(jnp.int32) for condition in conditions]
    if weights is not None:
        numbers = [number * weight for number, weight in zip(numbers, weights, strict=True)]
    return functools.reduce(jnp.add, numbers)


def triton_rule(areas: tuple[int, ...], dtype, head_width: int) -> Segments | None:
    """Return the rule if the Triton kernels are to attend on the current platform, or None."""
    # measured on an H200: in bfloat16 the kernels are 3 times as fast on 255 tokens, in exact float32 6 times as slow
    if current_platform() != "gpu" or dtype == jnp.float32:
        return None
    from mvar_jax.ops import triton_attention  # Pallas is slow to import

    return None if triton_attention.why_not(dtype, head_width) else Segments(areas)


def block_diagonal_attention(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, areas: tuple[int, ...], scale: float = 1.0
) -> jax.Array:
    """Return attention within each of consecutive scales, `[B, N, H, K]` in v's dtype; `areas` are their lengths."""
    if rule := triton_rule(areas, q_BNHK.dtype, q_BNHK.shape[-1]):
        from mvar_jax.ops import triton_attention  # Pallas is slow to import

        return triton_attention.attend(rule, q_BNHK, k_BNHK, v_BNHK, scale)
    return attend_in_groups(q_BNHK, k_BNHK, v_BNHK, areas, scale)


def group_scales(areas: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Split consecutive scales into groups of at most GROUP_TOKENS tokens (a larger scale stands alone)."""
    groups: list[tuple[int, ...]] = []
    current: list[int] = []
    for area in areas:
        if current and sum(current) + area > GROUP_TOKENS:
            groups.append(tuple(current))
            current = []
        current.append(area)
    return (*groups, tuple(current))


def attend_in_groups(
    q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, areas: tuple[int, ...], scale: float = 1.0
) -> jax.Array:
    """Attend within each scale: small scales in one masked product, large ones alone, so no product is N x N."""
    outputs, begin = [], 0
    for group in group_scales(areas):
        cut = slice(begin, begin + sum(group))
        mask = block_diagonal_mask(group) if len(group) > 1 else None
        outputs.append(dense_attention(q_BNHK[:, cut], k_BNHK[:, cut], v_BNHK[:, cut], mask, scale))
        begin = cut.stop
    return jnp.concatenate(outputs, axis=1)
