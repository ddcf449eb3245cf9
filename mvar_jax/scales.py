"""The pyramid of token maps: sides, offsets, windows and training phases (MVAR section 3; docs/method.md, Pyramid).

Everything here is hashable host integers, apart from small constant index tables.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from mvar_jax.errors import InputError

BLOCK_DIAGONAL = "block_diagonal"  # every token sees its own scale
WINDOW = "window"  # every token sees its k x k neighborhood in its own scale
BLOCK_CAUSAL = "block_causal"  # VAR: every token sees its own scale and all coarser ones

CONDITIONINGS = ("markov", "full")

KNOWN_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Scales `first .. last` (inclusive), trained or evaluated in one pass, and their tokens `[begin, end)`."""

    first: int
    last: int
    begin: int
    end: int
    attention: str

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin

    @property
    def num_scales(self) -> int:
        return self.last - self.first + 1

    @property
    def trains_start(self) -> bool:
        """Whether the start position belongs to the phase; in the window phases it receives no gradient."""
        return self.first == 0


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """S square token maps, coarse to fine.

    Attributes:
      sides: side of each map, strictly increasing.
      refine_step: first scale that uses the local window, 1 to S.
      kernel_size: odd window side k, one for all window scales or one for each of them.

    Raises InputError if sides, refine_step or kernel_size are not as described.
    """

    sides: tuple[int, ...]
    refine_step: int
    kernel_size: int | tuple[int, ...] = 7

    def __post_init__(self):
        check_sides(self.sides)
        S = len(self.sides)
        if not 1 <= self.refine_step <= S:
            message = f"refine_step must be from 1 to {S}, the number of scales, got {self.refine_step}"
            raise InputError(message, field="refine_step", given=self.refine_step, expected=f"1 to {S}")
        num_windows = S - self.refine_step
        if not isinstance(self.kernel_size, int) and len(self.kernel_size) != num_windows:
            expected = f"one window side, or one for each of the {num_windows} window scales"
            message = f"kernel_size must be {expected}, got {self.kernel_size}"
            raise InputError(message, field="kernel_size", given=self.kernel_size, expected=expected)
        for k in self.windows:
            check_window(k)

    @property
    def windows(self) -> tuple[int, ...]:
        """Return the window side of each scale from refine_step on."""
        num_windows = self.num_scales - self.refine_step
        return (self.kernel_size,) * num_windows if isinstance(self.kernel_size, int) else self.kernel_size

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def areas(self) -> tuple[int, ...]:
        return areas_of(self.sides)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return S + 1 offsets: scale l holds tokens `offsets[l] : offsets[l + 1]`."""
        return offsets_of(self.areas)

    @property
    def num_tokens(self) -> int:
        return sum(self.areas)

    def level_of_token(self) -> np.ndarray:
        """Return the scale of every token, `[L] int32`."""
        return np.repeat(np.arange(self.num_scales, dtype=np.int32), self.areas)

    def window(self, scale: int) -> int | None:
        """Return the window side of a scale, or None if the scale attends to all of itself."""
        return None if scale < self.refine_step else self.windows[scale - self.refine_step]

    def scale_phase(self, scale: int, conditioning: str = "markov") -> Phase:
        """Return the phase of one scale alone, as sampling uses it."""
        markov = BLOCK_DIAGONAL if scale < self.refine_step else WINDOW
        attention = BLOCK_CAUSAL if conditioning == "full" else markov
        return Phase(scale, scale, self.offsets[scale], self.offsets[scale + 1], attention)

    def phases(self, conditioning: str = "markov") -> tuple[Phase, ...]:
        """Return the training phases: coarse scales together, then each window scale; if "full", one causal phase."""
        if conditioning == "full":
            return (Phase(0, self.num_scales - 1, 0, self.num_tokens, BLOCK_CAUSAL),)
        coarse = Phase(0, self.refine_step - 1, 0, self.offsets[self.refine_step], BLOCK_DIAGONAL)
        return (coarse, *(self.scale_phase(l) for l in range(self.refine_step, self.num_scales)))


Side = int | tuple[int, int]  # of a square map, or (height, width)


def shape_of(side: Side) -> tuple[int, int]:
    """Return (height, width) of a map."""
    return (side, side) if isinstance(side, int) else side


def areas_of(sides: Sequence[Side]) -> tuple[int, ...]:
    """Return the number of tokens of each map."""
    return tuple(height * width for height, width in map(shape_of, sides))


def extend_sides(sides: Sequence[int], last: int) -> tuple[int, ...]:
    """Return the sides below `last`, then `last`; beyond the list they grow like 16, 24, 32, 48, 64."""
    found, side = list(sides), sides[-1]
    while side < last:
        found += [side + side // 2] * (side > 1) + [2 * side]
        side *= 2
    return (*(side for side in found if side < last), last)


def offsets_of(areas: Sequence[int]) -> tuple[int, ...]:
    """Return S + 1 offsets: map l holds tokens `offsets[l] : offsets[l + 1]`."""
    return tuple(itertools.accumulate(areas, initial=0))


def check_sides(sides: tuple[int, ...]) -> None:
    """Raise InputError unless sides are positive and strictly increasing."""
    if not sides or sides[0] < 1 or any(b <= a for a, b in zip(sides, sides[1:], strict=False)):
        expected = "positive and strictly increasing"
        raise InputError(f"sides must be {expected}, got {sides}", field="sides", given=sides, expected=expected)


def check_window(kernel_size: int, field: str = "kernel_size") -> None:
    """Raise InputError unless the window side is odd and positive."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        expected = "an odd window side of 1 or more"
        raise InputError(
            f"{field} must be {expected}, got {kernel_size}", field=field, given=kernel_size, expected=expected
        )


def phase_of(step: int, num_phases: int, ratio: int) -> int:
    """Return the index of the phase that `step` trains in the paper's schedule (MVAR section 3.3).

    A cycle is `ratio` steps of the coarse phase, then one step for each window scale. The published program
    never reaches the last scales if 1 < ratio < number of window scales; this schedule does.
    """
    place = step % (ratio + num_phases - 1)
    return 0 if place < ratio else place - ratio + 1
