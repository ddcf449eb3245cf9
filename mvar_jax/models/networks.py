"""A tokenizer, a transformer and a refiner with their weights; maybe a second model that draws the last scales."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mvar_jax.errors import InputError
from mvar_jax.models.refiner import Refiner, check_scales
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.precision import check_precision
from mvar_jax.scales import Phase
from mvar_jax.values import as_integer


@flax.struct.dataclass
class Networks:
    """A tokenizer and, unless it stands alone, a transformer and maybe its refiner, each with its weights.

    A pytree whose leaves are the weights; the modules are static. A compiled program takes it as one argument, and
    unused weights are not passed to the device.

    Attributes:
      tokenizer, transformer, refiner: linen modules; the transformer is None for a tokenizer alone.
      tokenizer_params, params, refiner_params: their parameters.
      later: the transformer and maybe refiner that draw the scales from number `switch` on, without a tokenizer of
        their own; None: all scales are drawn by these.
      switch: number of the first scale that `later` draws.
    """

    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    tokenizer_params: Any
    transformer: Transformer | None = flax.struct.field(pytree_node=False, default=None)
    params: Any = None
    refiner: Refiner | None = flax.struct.field(pytree_node=False, default=None)
    refiner_params: Any = None
    later: "Networks | None" = None
    switch: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, modules: dict, params: dict) -> "Networks":
        """Pair modules with parameters, both by "tokenizer", "transformer" and "refiner"."""
        both = (found.get(kind) for kind in ("transformer", "refiner") for found in (modules, params))
        return cls(modules["tokenizer"], params["tokenizer"], *both)

    def switched(self, later: "Networks", switch: int) -> "Networks":
        """Return the networks whose scales from number `switch` on are drawn by `later`, with the same tokenizer.

        Raises InputError unless `switch` is from 0 to the number of scales, and later ones need f_hat alone: VAR
        needs keys and values of all coarser scales.
        """
        num_scales = len(self.tokenizer.sides)
        switch = as_integer(switch, "switch", 0, num_scales, f"a number of scales from 0 to {num_scales}")
        if switch and later.transformer.conditioning == "full":
            words = "switch must be to an MVAR model: VAR needs keys and values of coarser scales; let VAR come first"
            raise InputError(words, field="switch", given="a VAR model", expected="an MVAR model")
        return self.replace(later=later.replace(tokenizer_params=None), switch=switch)

    def parts(self) -> tuple["Networks", "Networks"]:
        """Return two networks: the first draws the scales before `switch`, the second the others."""
        first = self.replace(later=None, switch=0)
        return first, self.later.replace(tokenizer=self.tokenizer, tokenizer_params=self.tokenizer_params)

    def at(self, scale: int) -> "Networks":
        """Return the networks that draw a scale."""
        return self if self.later is None else self.parts()[scale >= self.switch]

    def refined_scales(self, phase: Phase) -> tuple[int, ...]:
        """Return the scales of a phase whose tokens the refiner draws."""
        refined = () if self.refiner is None else self.refiner.refined
        return tuple(scale for scale in refined if phase.first <= scale <= phase.last)

    def refines(self, scale: int) -> bool:
        """Return whether the refiner draws a scale's tokens."""
        return self.refiner is not None and scale in self.refiner.refined

    def with_refiner(self, is_used: bool = True, scales: tuple[int, ...] | None = None) -> "Networks":
        """Return the networks without their refiner, or with it at some of its scales alone; None for all.

        At a switch each part keeps its own refiner, at those of the scales that it draws.

        Raises InputError if scales are given and there is no refiner, or it was not trained for them.
        """
        if self.later is not None:
            parts = []
            for part, is_later in zip(self.parts(), (False, True), strict=True):
                own = None if scales is None else tuple(s for s in scales if (s >= self.switch) == is_later)
                parts.append(part.with_refiner(is_used and own != (), own or None))
            return parts[0].switched(parts[1], self.switch)
        if scales is None:
            return self if is_used else self.replace(refiner=None, refiner_params=None)
        if not is_used or self.refiner is None:
            words = "refine_scales needs a refiner, but " + (
                "the checkpoint holds none; train one with task refiner" if is_used else "refiner is off"
            )
            raise InputError(words, field="refine_scales", given=scales, expected="a refiner")
        check_scales(scales, self.refiner.refined, "refine_scales")
        if not scales:
            return self.with_refiner(False)
        return self.replace(refiner=self.refiner.clone(scales=scales))

    def with_dtype(self, dtype: str | None) -> "Networks":
        """Return the networks with this dtype of computation and, of all but the tokenizer, of weights.

        None keeps both.
        """
        if dtype is None:
            return self
        kind = jnp.dtype(dtype).type
        return self.replace(
            tokenizer=self.tokenizer.clone(dtype=kind),
            transformer=self.transformer and self.transformer.clone(dtype=kind),
            params=jax.tree.map(lambda x: x.astype(kind), self.params),
            refiner=self.refiner and self.refiner.clone(dtype=kind),
            refiner_params=jax.tree.map(lambda x: x.astype(kind), self.refiner_params),
            later=self.later and self.later.with_dtype(dtype),
        )

    def with_precision(self, precision: str | None) -> "Networks":
        """Return the networks with this `precision`; None keeps each module's. Raises InputError if it is unknown."""
        if precision is None:
            return self
        check_precision(precision)
        exact = lambda module: module and module.clone(precision=precision)
        modules = {kind: exact(getattr(self, kind)) for kind in ("tokenizer", "transformer", "refiner")}
        return self.replace(**modules, later=self.later and self.later.with_precision(precision))

    def for_decoding(self) -> "Networks":
        """Return the networks whose tokenizer decodes latent maps, inside a program.

        If the tokenizer or the transformer computes in bfloat16, a GPU decodes in float16, as the published program
        does: at the same rate, images are three bits more exact. Otherwise, and on a CPU or TPU, the decoder computes
        in the tokenizer's dtype, and in float32 if the precision is exact. Its kernels are cast here, so that a loop
        over images casts none.
        """
        tokenizer, params = self.tokenizer, self.tokenizer_params
        is_low = jnp.bfloat16 in {module.dtype for module in (tokenizer, self.transformer) if module is not None}
        if is_low and current_platform() == "gpu":
            tokenizer = tokenizer.clone(dtype=jnp.float16)
        decoder = _cast_kernels(params["decoder"], tokenizer.decoder_dtype)
        return self.replace(tokenizer=tokenizer, tokenizer_params={**params, "decoder": decoder})

    def apply_tokenizer(self, *args, method: str):
        """Call a method of the tokenizer with its weights, inside a program."""
        return self.tokenizer.apply({"params": self.tokenizer_params}, *args, method=method)


def _cast_kernels(params: dict, dtype) -> dict:
    """Return a tree of parameters in which kernels and their biases have this dtype."""
    if "kernel" in params:
        return {name: x.astype(dtype) for name, x in params.items()}
    return {name: _cast_kernels(x, dtype) if isinstance(x, dict) else x for name, x in params.items()}


@functools.partial(jax.jit, static_argnames=("method",))
def apply_tokenizer(networks: Networks, x: jax.Array, method: str) -> jax.Array:
    """Call a method of the tokenizer as a program of its own, compiled once for all its callers."""
    return networks.apply_tokenizer(x, method=method)


def check_fit(tokenizer: Tokenizer, transformer: Transformer, section: str = "") -> None:
    """Raise InputError unless both have the same scales and codebook sizes. section: see `fit_of`."""
    check_same(fit_of(tokenizer, transformer, section))


def fit_of(tokenizer: Tokenizer, transformer: Transformer, section: str = "") -> dict[str, tuple[Any, Any]]:
    """Return field -> (the transformer's value, the tokenizer's) of what both must have in common.

    section: what is put in front of the fields' names, such as "config.model.".
    """
    names = ("sides", "vocab_size", "code_width")
    return {section + name: (getattr(transformer, name), getattr(tokenizer, name)) for name in names}


def check_same(values: dict[str, tuple[Any, Any]]) -> None:
    """Raise InputError that names every field whose two values, the given and the tokenizer's, differ."""
    differing = [(field, ours, theirs) for field, (ours, theirs) in values.items() if ours != theirs]
    if differing:
        words = "; ".join(
            f"{field} must be {theirs} as in the tokenizer, got {ours}" for field, ours, theirs in differing
        )
        field, ours, theirs = differing[0]
        raise InputError(words, field=field, given=ours, expected=str(theirs))
