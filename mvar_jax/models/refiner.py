"""The refiner: it draws the tokens of a map one after another, on a frozen transformer (docs/method.md, Refiner).

After Logit Refiner (arXiv 2609.11804). Without a window it is the paper's form; with one, a token sees its drawn
neighborhood alone, so that all tokens of a diagonal are drawn at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.models.draw_order import neighbors, num_neighbors, visible, visible_mask
from mvar_jax.models.init import LINEN_FIELDS, normal
from mvar_jax.models.layers import FeedForward, Linear, branch_dtype
from mvar_jax.models.query_key_value import query_key_value
from mvar_jax.models.transformer import Transformer, head_of
from mvar_jax.ops.attention import dense_attention, softmax_attention
from mvar_jax.ops.norm import layer_norm
from mvar_jax.ops.precision import PRECISIONS, STANDARD, dtype_of_ends, in_own_precision
from mvar_jax.ops.sampling import guide
from mvar_jax.scales import areas_of, check_sides, check_window, offsets_of
from mvar_jax.schema import Choice, Count, Layers
from mvar_jax.sharding import constrain, named_axes

INIT_FACTOR = 1.5  # of the weights' standard deviation, relative to the transformer's

# (number of the block, q, k, v) -> (attention's output [B, N, H, K], what the block keeps)
AttendFn = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class RefinerBlock(nn.Module):
    """Attention and feed-forward without a class input; at the start both branches give zero."""

    num_heads: int
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]):
        D = x_BND.shape[-1]
        y_BNHK, kept = attend(*query_key_value(self, layer_norm(x_BND).astype(self.dtype)))
        init = named_axes(nn.initializers.zeros, "heads", "head_width", "width")
        sum_dtype = branch_dtype(self.dtype)
        out = Linear(D, init, self.dtype, self.dtype, num_axes=2, sum_dtype=sum_dtype, name="proj")
        x_BND = self.add_branch(x_BND, out(y_BNHK))
        feed_forward = FeedForward(self.init_std, 0.0, self.dtype, name="ffn")
        return self.add_branch(x_BND, feed_forward(layer_norm(x_BND))), kept

    def add_branch(self, x_BND, branch_BND):
        return constrain(x_BND + branch_BND.astype(x_BND.dtype), "batch", "tokens", None)


class Refiner(nn.Module):
    """Small network from the transformer's last hidden states and the ids drawn so far to better logits.

    Attributes:
      sides: side of each token map, as the transformer's.
      vocab_size: number of codes, as the transformer's.
      code_width: width of a code, as the transformer's.
      width: width of a token, as the transformer's.
      num_heads: attention heads, a divisor of width.
      depth: number of blocks.
      window: odd side of the window of drawn tokens that a token sees, 3 or more; None for all earlier tokens of the
        map, with the predecessor alone as input (the paper's form).
      scales: scales that are refined, by number from 0, rising; () for all. The others keep the transformer's logits.
      dtype: computation; parameters, norms, softmax, sums of branches and logits are float32.
      precision: of float32 products on accelerators: standard (exact if listed in ops/precision.py) or exact (all).
    """

    sides: tuple[int, ...]
    vocab_size: Count
    code_width: Count
    width: Count
    num_heads: Count
    depth: Layers = 2
    window: int | None = 3
    scales: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    precision: Annotated[str, Choice(PRECISIONS)] = dataclasses.field(default=STANDARD, metadata=FREE)

    def check(self) -> None:
        """Raise InputError if the fields contradict each other."""
        check_fields(self, "", hidden=LINEN_FIELDS)
        check_sides(self.sides)
        if self.width % self.num_heads:
            expected = f"a divisor of width={self.width}"
            message = f"num_heads must be {expected}, got {self.num_heads}"
            raise InputError(message, field="num_heads", given=self.num_heads, expected=expected)
        if self.window is not None:
            check_window(self.window, "window")
            largest = max(3, 2 * self.sides[-1] + 1)  # no token sees further
            if not 3 <= self.window <= largest:
                expected = f"from 3 to {largest}, or None for all earlier tokens"
                message = f"window must be {expected}, got {self.window}"
                raise InputError(message, field="window", given=self.window, expected=expected)
        check_scales(self.scales, range(len(self.sides)))

    @property
    def refined(self) -> tuple[int, ...]:
        """Return the scales that are refined."""
        return self.scales or tuple(range(len(self.sides)))

    @property
    def end_dtype(self) -> Any:
        """Return the dtype of the operands of the embeddings and of the head."""
        return dtype_of_ends(self.dtype, self.precision)

    @nn.compact
    @in_own_precision
    def __call__(
        self,
        hidden_BND: jax.Array,
        codes_BNOc: jax.Array,
        is_outside_NO: jax.Array,
        attend: AttendFn,
        guidance: jax.Array | float | None = None,
    ):
        """Compute the logits of N tokens; see `teacher_forced` and `draw_step`, which call this.

        Args:
          hidden_BND: the transformer's hidden states of the tokens, float32.
          codes_BNOc: codes of each token's drawn neighbors.
          is_outside_NO: neighbors that are outside the map: a learned vector stands for them.
          attend: attention of each block.
          guidance: as in `Transformer.__call__`, for rows that are pairs of a class and "no class".

        Returns (logits `[B, N, V] float32`, what `attend` kept for each block).
        """
        D, std = self.width, INIT_FACTOR * float(np.sqrt(1 / (3 * self.width)))
        embed_init = named_axes(normal(std), "code", "width")
        embed = Linear(D, embed_init, self.end_dtype, jnp.float32, part="embedding", name="embed")
        outside_D = self.param("outside", named_axes(nn.initializers.normal(1.0), "width"), (D,))
        drawn_BNOD = jnp.where(is_outside_NO[..., None], outside_D, embed(codes_BNOc))
        parts = jnp.concatenate([hidden_BND[:, :, None], drawn_BNOD], axis=2)
        init = named_axes(identity_of_first, None, "width", None)
        mix = Linear(D, init, self.end_dtype, jnp.float32, part="embedding", num_axes=2, name="input")
        x_BND, kept = constrain(mix(parts), "batch", "tokens", None), []
        for i in range(self.depth):
            block = RefinerBlock(self.num_heads, std, self.dtype, name=f"block_{i}")
            x_BND, kept_here = block(x_BND, functools.partial(attend, i))
            kept.append(kept_here)
        if guidance is not None:
            pairs_B2ND = x_BND.reshape(-1, 2, *x_BND.shape[1:])
            x_BND = guide(pairs_B2ND[:, 0], pairs_B2ND[:, 1], guidance)
        return constrain(head_of(self, name="head")(x_BND), "batch", "tokens", "vocab"), kept

    def teacher_forced(
        self, hidden_BND: jax.Array, ids_BN: jax.Array, codebook_Vc: jax.Array, scales: tuple[int, ...]
    ):
        """Return the logits `[B, N, V] float32` of all tokens of some maps, each given the true earlier ones.

        Args:
          hidden_BND: the transformer's hidden states of these maps' tokens, float32.
          ids_BN: their ids.
          codebook_Vc: the tokenizer's.
          scales: the maps.
        """
        sides = [self.sides[scale] for scale in scales]
        begins = offsets_of(areas_of(sides))
        tables = [neighbors(side, self.window)[:-1] for side in sides]
        outside = np.concatenate([table == len(table) for table in tables])
        places = np.concatenate([np.minimum(t, len(t) - 1) + b for t, b in zip(tables, begins, strict=False)])

        def attend(_, q, k, v):
            parts = []
            for side, begin in zip(sides, begins, strict=False):
                q_, k_, v_ = (x[:, begin : begin + side * side] for x in (q, k, v))
                parts.append(dense_attention(q_, k_, v_, visible_mask(side, self.window)))
            return jnp.concatenate(parts, axis=1), None

        return self(hidden_BND, codebook_Vc[ids_BN[:, places]], outside, attend)[0]

    def draw_step(
        self,
        hidden_BnD: jax.Array,
        places_n: jax.Array,
        ids_BP: jax.Array,
        caches: list[tuple[jax.Array, jax.Array]],
        codebook_Vc: jax.Array,
        guidance: jax.Array | float | None = None,
    ):
        """Compute the logits of some places of one map, given the ids that are drawn.

        Args:
          hidden_BnD: the transformer's hidden states of the places, float32; with guidance two rows for each of ids.
          places_n: int32; N, one past the last, is a dummy.
          ids_BP: ids of the map so far, P = N + 1; places not yet drawn may hold anything.
          caches: see `empty_caches`.
          codebook_Vc: the tokenizer's.
          guidance: as in `__call__`.

        Returns (logits `[B, n, V] float32`, the caches with the places' keys and values).
        """
        N = ids_BP.shape[1] - 1
        side, window = round(N**0.5), self.window
        table_nO = jnp.asarray(neighbors(side, window))[places_n]
        codes_BnOc = codebook_Vc[ids_BP[:, table_nO]]
        codes_BnOc = jnp.repeat(codes_BnOc, len(hidden_BnD) // len(ids_BP), axis=0)
        visible_nM = jnp.asarray(visible(side, window))[places_n]

        def attend(i, q, k, v):
            past_k, past_v = caches[i]
            k, v = past_k.at[:, places_n].set(k), past_v.at[:, places_n].set(v)
            if window is None:  # one place sees all earlier ones: a gather would copy the cache
                seen_n = jnp.arange(N + 1) <= places_n[:, None]
                return dense_attention(q, k, v, seen_n), (k, v)
            near_k, near_v = (x[:, visible_nM].swapaxes(2, 3) for x in (k, v))
            mask = (visible_nM < N)[:, None, None]
            return softmax_attention(q[..., None, :], near_k, near_v, mask, 1.0)[..., 0, :], (k, v)

        return self(hidden_BnD, codes_BnOc, table_nO == N, attend, guidance)

    def empty_caches(self, scale: int, num_rows: int) -> list[tuple[jax.Array, jax.Array]]:
        """Return the keys and values of each block for the places of one map and the dummy, `[rows, N + 1, H, K]`."""
        shape = (num_rows, self.sides[scale] ** 2 + 1, self.num_heads, self.width // self.num_heads)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.depth)]

    def init_params(self, key: jax.Array):
        """Return the parameter tree, each leaf boxed with its logical axes; call under jit or eval_shape."""
        hidden = jnp.zeros((1, 1, self.width))
        num = num_neighbors(self.window)
        alone: AttendFn = lambda _, q, k, v: (v, None)
        codes, outside = jnp.zeros((1, 1, num, self.code_width)), jnp.ones((1, num), bool)
        return self.init(key, hidden, codes, outside, alone)["params"]

    def macs(self, scales: Sequence[int]) -> int:
        """Return the multiply-accumulates of the tokens of some maps, for one image, without norms and biases."""
        D, total = self.width, 0
        a_token = D * D * (1 + num_neighbors(self.window)) + self.depth * 12 * D**2
        a_token += D * (self.vocab_size + num_neighbors(self.window) * self.code_width)
        for scale in scales:
            num_seen = int(visible_mask(self.sides[scale], self.window).sum())
            total += a_token * self.sides[scale] ** 2 + self.depth * 2 * D * num_seen
        return total

    def mesh_sizes(self) -> dict[str, tuple[str, int]]:
        """Return config key -> (logical axis, size) of the dimensions that a mesh cuts and must divide."""
        D = self.width
        named = {"width": ("width", D), "num_heads": ("heads", self.num_heads), "width * 4": ("hidden", 4 * D)}
        return {**named, "vocab_size": ("vocab", self.vocab_size)}


def identity_of_first(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialize a kernel `[parts, D, D]` that passes its first part on and ignores the others."""
    del key
    return jnp.zeros(shape, dtype).at[0].set(jnp.eye(shape[1], dtype=dtype))


def start_weights(params: Any, codebook_Vc: Any) -> dict[str, Any]:
    """Return the refiner's parameters that begin as the transformer's: its head, and its word embedding of std 1."""
    word = {name: np.asarray(x, np.float32) for name, x in params["word_embed"].items()}
    std = float(np.std(np.asarray(codebook_Vc, np.float32) @ word["kernel"] + word["bias"]))
    embed = {name: x / (std or 1.0) for name, x in word.items()}
    return {"head": jax.tree.map(np.asarray, params["head"]), "embed": embed}


def check_base(refiner: Refiner, transformer: Transformer) -> None:
    """Raise InputError unless a refiner has the scales, codes and width of its transformer."""
    for name in ("sides", "vocab_size", "code_width", "width"):
        ours, theirs = getattr(refiner, name), getattr(transformer, name)
        if ours != theirs:
            words = f"{name} must be {theirs} as in the transformer, got {ours}"
            raise InputError(words, field=name, given=ours, expected=str(theirs))


def check_scales(scales: tuple[int, ...], allowed: Any, field: str = "scales") -> None:
    """Raise InputError unless scales are numbers of `allowed`, rising."""
    if any(scale not in allowed for scale in scales) or sorted(set(scales)) != list(scales):
        expected = f"numbers of {', '.join(map(str, allowed))}, rising"
        raise InputError(f"{field} must be {expected}, got {scales}", field=field, given=scales, expected=expected)
