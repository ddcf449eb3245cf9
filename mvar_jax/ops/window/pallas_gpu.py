"""Local-window attention by the Triton kernels, without arrays [N, N] or [N, W * W]."""

import dataclasses

import jax
import jax.numpy as jnp

from mvar_jax.ops import triton_attention


@dataclasses.dataclass(frozen=True)
class Window:
    """The rule of a window, cut to the map; tokens are numbered row by row."""

    height: int
    width: int
    window_y: int
    window_x: int

    @property
    def num_tokens(self) -> int:
        return self.height * self.width

    def is_seen(self, query_Q, key_K):
        first_y = window_start(query_Q // self.width, self.height, self.window_y)[:, None]
        first_x = window_start(query_Q % self.width, self.width, self.window_x)[:, None]
        y, x = (key_K // self.width)[None], (key_K % self.width)[None]
        in_y = (y >= first_y) & (y < first_y + self.window_y)
        in_x = (x >= first_x) & (x < first_x + self.window_x)
        return in_y & in_x & (key_K < self.num_tokens)[None]

    def keys_of(self, begin, end):
        first = window_start(begin // self.width, self.height, self.window_y)
        last = window_start((end - 1) // self.width, self.height, self.window_y) + self.window_y
        return first * self.width, last * self.width

    def queries_of(self, begin, end):
        reach = self.window_y // 2
        first, last = begin // self.width, (end - 1) // self.width
        first = jnp.where(first < self.window_y, 0, first - reach)
        last = jnp.where(last >= self.height - self.window_y, self.height, last + reach + 1)
        return first * self.width, last * self.width


def window_start(place, length: int, window: int):
    """Return the first key of a query's window along one axis."""
    return jnp.clip(place - window // 2, 0, length - window)


def why_not(q_BYXHK) -> str | None:
    """Return the reason that this backend does not support q, or None if it does."""
    return triton_attention.why_not(q_BYXHK.dtype, q_BYXHK.shape[-1])


def rule_of(height: int, width: int, window: int) -> Window:
    return Window(height, width, min(window, height), min(window, width))


def attend(q_BYXHK, k_BYXHK, v_BYXHK, kernel_size: int, scale: float, interpret: bool = False) -> jax.Array:
    """Compute local-window attention on a CUDA GPU; `interpret` runs it on any platform, slowly."""
    B, Y, X, H, K = q_BYXHK.shape
    q, k, v = (x.reshape(B, Y * X, H, K) for x in (q_BYXHK, k_BYXHK, v_BYXHK))
    rule = rule_of(Y, X, kernel_size)
    return triton_attention.attend(rule, q, k, v, scale, interpret).reshape(q_BYXHK.shape)
