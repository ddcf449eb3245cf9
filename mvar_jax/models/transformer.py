"""The scale- and spatial-Markov transformer (MVAR section 3) and, with the same parameters, VAR."""

import dataclasses
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.models.init import LINEN_FIELDS, normal
from mvar_jax.models.layers import Adaptive, Block, Linear, alternate
from mvar_jax.ops.norm import modulated_norm
from mvar_jax.ops.precision import PRECISIONS, STANDARD, computing, dtype_of_ends, in_own_precision
from mvar_jax.ops.products import PRODUCT
from mvar_jax.ops.sampling import guide
from mvar_jax.ops.window import BACKENDS
from mvar_jax.scales import BLOCK_DIAGONAL, CONDITIONINGS, Phase, Pyramid
from mvar_jax.schema import Choice, Count, Decay, Layers, Natural, NotNegative, Positive
from mvar_jax.sharding import constrain, named_axes

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Modulation(NamedTuple):
    """The part of the computation that depends on the class alone, so it is the same at every scale.

    Attributes:
      cond: class rows, `[B, D]`.
      blocks: adaptive vectors of all blocks, `[depth, B, 6, D] float32`.
      head: adaptive vectors of the head, `[B, 2, D] float32`.
    """

    cond: jax.Array
    blocks: jax.Array
    head: jax.Array


class Transformer(nn.Module):
    """Transformer that predicts the ids of a phase's tokens from the class and the previous scale.

    Attributes:
      sides: side of each token map, as the tokenizer's.
      refine_step: first scale that attends to a local window; coarser scales attend to all of themselves.
      kernel_size: odd side of the window, or one for each scale from refine_step on.
      vocab_size: number of codes, as the tokenizer's.
      code_width: width of a code, as the tokenizer's.
      num_classes: number of classes; 0 takes it from the data.
      depth: number of blocks.
      width: width of a token; the published models use 64 * depth.
      num_heads: attention heads, a divisor of width.
      conditioning: markov (MVAR) or full (VAR: every coarser scale is attended to).
      shared_aln: one adaptive linear for all blocks, with an offset a block, instead of one a block.
      drop_path_rate: drop-path rate of the last block, growing linearly from 0 at the first.
      init_adaptive: factor of the adaptive linears' initial weights (scale and shift parts).
      init_gamma: factor of their initial weights in the two gamma parts.
      init_head: factor of the head's initial weights.
      class_init_std: standard deviation of the initial class table; None for sqrt(1 / (3 * width)).
      window_backend: implementation of window attention; auto chooses by platform and size.
      remat: what the backward pass recomputes: dots (all but products with weights), full (all) or none.
      scan_unroll: blocks in an iteration of the scan over depth in training; more compile longer. Sampling takes one.
      dtype: computation; parameters, norms, softmax and logits are float32.
      precision: of float32 products on accelerators: standard (exact if listed in ops/precision.py) or exact (all).
    """

    sides: tuple[int, ...]
    refine_step: int
    kernel_size: int | tuple[int, ...]
    vocab_size: Count
    code_width: Count
    num_classes: Natural
    depth: Layers
    width: Count
    num_heads: Count
    conditioning: Annotated[str, Choice(CONDITIONINGS)] = "markov"
    shared_aln: bool = False
    drop_path_rate: Decay = 0.0
    init_adaptive: NotNegative = 0.5
    init_gamma: NotNegative = 1e-5
    init_head: NotNegative = 0.02
    class_init_std: Positive | None = None
    window_backend: Annotated[str, Choice(("auto", *sorted(BACKENDS)))] = dataclasses.field(
        default="auto", metadata=FREE
    )
    remat: Annotated[str, Choice(tuple(REMAT_POLICIES))] = dataclasses.field(default="dots", metadata=FREE)
    scan_unroll: Count = dataclasses.field(default=1, metadata=FREE)
    dtype: Any = jnp.float32
    precision: Annotated[str, Choice(PRECISIONS)] = dataclasses.field(default=STANDARD, metadata=FREE)

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.sides, self.refine_step, self.kernel_size)

    def check(self) -> None:
        """Raise InputError if the fields contradict each other."""
        check_fields(self, "", hidden=LINEN_FIELDS)
        _ = self.pyramid
        if self.width % self.num_heads:
            expected = f"a divisor of width={self.width}"
            message = f"num_heads must be {expected}, got {self.num_heads}"
            raise InputError(message, field="num_heads", given=self.num_heads, expected=expected)

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases, which together cover every token once."""
        return self.pyramid.phases(self.conditioning)

    @nn.compact
    @in_own_precision
    def __call__(
        self,
        previous_BMc: jax.Array,
        labels_B: jax.Array,
        phase: Phase,
        path_D2B: jax.Array | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        modulation: tuple[Modulation, ...] | None = None,
        guidance: jax.Array | float | None = None,
        returns_hidden: bool = False,
    ):
        """Compute the logits of one phase.

        Args:
          previous_BMc: teacher-forcing input of the phase's tokens, `[B, M, c] float32`; the start tokens of scale 0
            have none, so M = N - n_0 if the phase begins at 0, else N.
          labels_B: `[B] int32`; num_classes means "no class".
          path_D2B: drop-path factors, `[depth, 2, B]`, or None to keep every branch.
          cache: VAR's keys and values, see `empty_cache`.
          modulation: results of `modulate`, given instead of labels; the rows of two parts are interleaved.
          guidance: t of `guide`, a number or `[B / 2, 1, 1]`; given, the rows are pairs of a class and "no class".
            They are mixed before the head: it is linear and (1 + t) - t = 1, so the result are the guided logits.
          returns_hidden: return the head's input `[B, N, D] float32`, which a refiner takes, instead of logits.

        Returns (logits `[B, N, V] float32`, the cache with the phase's keys and values; None without a cache).
        """
        std = float(np.sqrt(1 / (3 * self.width)))
        cond_BD = self.class_rows(labels_B, std) if modulation is None else alternate([m.cond for m in modulation])
        x_BND = self.embed(previous_BMc, cond_BD, phase, std)
        shared, adaptive = cond_BD, None
        if modulation is not None:
            adaptive = tuple(part.blocks for part in modulation)
        elif self.shared_aln:
            shared = Adaptive(6, std, (1.0,) * 6, name="shared_adaptive")(cond_BD)

        # the cache is carried, not scanned over: XLA updates a carried array in place but would copy a stacked one
        blocks = self.scan_blocks(phase, std)
        (x_BND, cache), _ = blocks((x_BND, cache), shared, adaptive, path_D2B, np.arange(self.depth))

        if modulation is None:
            ends = Adaptive(2, std, (self.init_adaptive,) * 2, name="head_adaptive")(cond_BD)
        else:
            ends = alternate([part.head for part in modulation])
        x_BND = modulated_norm(x_BND, ends[:, None, 0], ends[:, None, 1])
        if guidance is not None:
            pairs_B2ND = x_BND.reshape(-1, 2, *x_BND.shape[1:])
            x_BND = guide(pairs_B2ND[:, 0], pairs_B2ND[:, 1], guidance)
        if returns_hidden:
            return constrain(x_BND, "batch", "tokens", None), cache
        logits = head_of(self, self.init_head, name="head")(x_BND)
        return constrain(logits, "batch", "tokens", "vocab"), cache

    def scan_blocks(self, phase: Phase, std: float) -> nn.Module:
        """Return the blocks of a phase as one module, a scan over depth; call inside the compact method."""
        block = Block
        if self.remat != "none":
            # without a loop XLA sees both passes at once, and would keep what the backward pass is to compute again
            is_loop = self.scan_unroll < self.depth
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not is_loop)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0, 0),
            length=self.depth,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(
            self.pyramid,
            phase,
            self.num_heads,
            self.depth,
            std,
            self.init_adaptive,
            self.init_gamma,
            self.shared_aln,
            self.window_backend,
            self.remat,
            self.dtype,
            name="blocks",
        )

    @property
    def end_dtype(self) -> Any:
        """Return the dtype of the operands of the word embedding and of the head."""
        return dtype_of_ends(self.dtype, self.precision)

    def empty_cache(self, num_rows: int) -> tuple[jax.Array, jax.Array]:
        """Return VAR's empty key and value caches for all layers and tokens, each `[depth, rows, H, L, K]`.

        In this order of axes both attention products read the cache as it is; in another, XLA would copy it whole.
        """
        shape = (self.depth, num_rows, self.num_heads, self.pyramid.num_tokens, self.width // self.num_heads)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def class_rows(self, labels_B, std):
        """Return the class embeddings `[B, D]`; call inside the compact method."""
        init = named_axes(normal(std if self.class_init_std is None else self.class_init_std), "classes", "width")
        rows_BD = self.param("class_embed", init, (self.num_classes + 1, self.width))[labels_B]
        return constrain(rows_BD, "batch", None)

    def embed(self, previous_BMc, cond_BD, phase, std):
        """Embed start tokens (class + start position) and projected input; add position and scale embeddings."""
        D, pyramid = self.width, self.pyramid
        start_ND = self.param("pos_start", named_axes(normal(std), "tokens", "width"), (pyramid.areas[0], D))
        position_LD = self.param("pos_embed", named_axes(normal(std), "tokens", "width"), (pyramid.num_tokens, D))
        level_SD = self.param("level_embed", named_axes(normal(std), None, "width"), (pyramid.num_scales, D))
        init = named_axes(normal(std), "code", "width")
        word = Linear(D, init, self.end_dtype, jnp.float32, part="embedding", name="word_embed")
        parts = [cond_BD[:, None] + start_ND] if phase.first == 0 else []
        if previous_BMc.shape[1]:
            parts.append(word(previous_BMc))
        x_BND = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        levels = pyramid.level_of_token()[phase.begin : phase.end]
        x_BND = x_BND + level_SD[levels] + position_LD[phase.begin : phase.end]
        return constrain(x_BND.astype(self.dtype), "batch", "tokens", None)

    def init_params(self, key: jax.Array):
        """Return the parameter tree, each leaf boxed with its logical axes; call under jit or eval_shape."""
        pyramid = self.pyramid
        everything = Phase(0, pyramid.num_scales - 1, 0, pyramid.num_tokens, BLOCK_DIAGONAL)
        previous = jnp.zeros((1, pyramid.num_tokens - pyramid.areas[0], self.code_width))
        return self.init(key, previous, jnp.zeros((1,), jnp.int32), everything)["params"]

    def mesh_sizes(self) -> dict[str, tuple[str, int]]:
        """Return config key -> (logical axis, size) of the dimensions that a mesh cuts and must divide."""
        D = self.width
        named = {"width": ("width", D), "num_heads": ("heads", self.num_heads), "width * 4": ("hidden", 4 * D)}
        return {**named, "vocab_size": ("vocab", self.vocab_size)}

    def drop_path_rates(self) -> np.ndarray:
        """Return the probability of dropping each block's branches, `[depth] float32`."""
        return np.linspace(0, self.drop_path_rate, self.depth, dtype=np.float32)


def head_of(model: Any, init_factor: float = 1.0, name: str | None = None) -> Linear:
    """Return the linear layer from a hidden state to logits, of a transformer or a refiner."""
    init = named_axes(normal(float(np.sqrt(1 / (3 * model.width))), init_factor), "width", "vocab")
    return Linear(model.vocab_size, init, model.end_dtype, jnp.float32, part="head", name=name)


def head_logits(model: Transformer, params, hidden_BND: jax.Array) -> jax.Array:
    """Return the logits `[B, N, V] float32` of hidden states, as `Transformer.__call__` computes them."""
    with computing(model.precision):
        return constrain(head_of(model).apply({"params": params["head"]}, hidden_BND), "batch", "tokens", "vocab")


def modulate(model: Transformer, params, labels_B: jax.Array) -> Modulation:
    """Compute the `Modulation` of labels `[B] int32`, once for all scales of a sample."""

    def vectors(num: int, weights, cond_BD):
        with computing(model.precision):
            return Adaptive(num, 1.0, (1.0,) * num).apply({"params": weights}, cond_BD)

    cond_BD, blocks = constrain(params["class_embed"][labels_B], "batch", None), params["blocks"]
    if model.shared_aln:
        shared = vectors(6, params["shared_adaptive"], cond_BD)
        adaptive = shared + blocks["adaptive_offset"][:, None]
    else:
        # layer by layer, since one product over all layers would copy the weights to another layout
        adaptive = jax.lax.map(lambda weights: vectors(6, weights, cond_BD), blocks["adaptive"])
    return Modulation(cond_BD, adaptive, vectors(2, params["head_adaptive"], cond_BD))


def previous_of(previous_BMc: jax.Array, phase: Phase, num_start: int) -> jax.Array:
    """Return the rows of the whole teacher-forcing input `[B, L - n_0, c]` that belong to a phase's tokens."""
    return previous_BMc[:, max(phase.begin - num_start, 0) : phase.end - num_start]
