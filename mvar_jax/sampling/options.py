"""How ids are drawn from logits, and which of them are known."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.ops.sampling import filter_logits
from mvar_jax.values import as_flag, as_integer, as_real

DRAWN_SHARE = 0.5  # a token is drawn if more than this share of its area is masked


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How ids are drawn from logits.

    Attributes:
      cfg: guidance, 0 (none) to 1e6.
      top_k, top_p: filters; 0 switches one off, top_k 1 is greedy.
      smooth: Gumbel average of codes instead of drawn ones.
      temperature: divides the guided logits before the filters, 1e-6 to 1e6; 1 in the published programs. One number,
        or one for each scale, coarse to fine.

    Numbers of numpy and jax become Python's. Raises InputError if a value is of another type or out of range, beyond
    which float32 would overflow.
    """

    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    smooth: bool = False
    temperature: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        checked = {
            "cfg": as_real(self.cfg, "cfg", 0, 1e6, "from 0 (no guidance) to 1e6"),
            "top_k": as_integer(self.top_k, "top_k", 0, expected="0 or more (0: off)"),
            "top_p": as_real(self.top_p, "top_p", 0, 1, "from 0 to 1 (0: off)"),
            "smooth": as_flag(self.smooth, "smooth"),
            "temperature": _as_temperature(self.temperature),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_scales(self, num_scales: int) -> None:
        """Raise InputError unless `temperature` is one number, or one for each scale."""
        given = self.temperature
        if isinstance(given, tuple) and len(given) != num_scales:
            expected = f"one number or {num_scales}, one for each scale"
            words = f"temperature must be {expected}, got {len(given)}"
            raise InputError(words, field="temperature", given=given, expected=expected)

    def at(self, scale: int, num_scales: int) -> "SampleOptions":
        """Return the options of one scale, with its temperature alone. Raises InputError as `check_scales`."""
        self.check_scales(num_scales)
        if not isinstance(self.temperature, tuple):
            return self
        return dataclasses.replace(self, temperature=self.temperature[scale])

    def apply(self, logits: jax.Array) -> jax.Array:
        """Return guided logits divided by the temperature, which is one number, and then filtered."""
        logits = logits if self.temperature == 1 else logits / self.temperature
        return filter_logits(logits, self.top_k, self.top_p)


def _as_temperature(given: Any) -> float | tuple[float, ...]:
    """Return one temperature, or several as a tuple. Raises InputError if one is not a number in range."""
    is_array = isinstance(given, np.ndarray | jax.Array) and given.ndim == 1
    parts = list(given) if is_array or (isinstance(given, list | tuple) and given) else [given]
    checked = tuple(as_real(one, "temperature", 1e-6, 1e6, "from 1e-6 to 1e6 (1: no change)") for one in parts)
    return checked[0] if len(checked) == 1 else checked


class Known(NamedTuple):
    """The tokens of a map that are known, as in editing.

    Attributes:
      ids_BN: ids of the image that is edited.
      share_BN: how much of each token is drawn, from 0 (known) to 1; above DRAWN_SHARE its id is the drawn one.
    """

    ids_BN: jax.Array
    share_BN: jax.Array

    def keep(self, ids_BN: jax.Array, places: Any = slice(None)) -> jax.Array:
        """Return drawn ids, those of known tokens replaced. places: of the ids in the map, all by default."""
        return jnp.where(self.share_BN[:, places] > DRAWN_SHARE, ids_BN, self.ids_BN[:, places])

    def mix(self, codes_BNc: jax.Array, codebook_Vc: jax.Array) -> jax.Array:
        """Return drawn codes, mixed with those of the known ids by the share."""
        share = self.share_BN[..., None]
        return share * codes_BNc + (1 - share) * codebook_Vc[self.ids_BN]
