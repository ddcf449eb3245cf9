"""The pyramid of token maps: sides, offsets, windows and training phases (paper section 3; VAR section 3).

Everything here is host integers, hashable, and shared by every other module. No arrays cross this file
but small constant index tables.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from mvar_jax.errors import InputError

BLOCK_DIAGONAL = "block_diagonal"  # every token sees its own scale
WINDOW = "window"  # every token sees k x k neighbours of its own scale
BLOCK_CAUSAL = "block_causal"  # VAR: own scale and all coarser ones

CONDITIONINGS = ("markov", "full")

KNOWN_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Scales `first .. last` (inclusive) trained or evaluated in one pass; tokens `[begin, end)`."""

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
        """Whether the start position takes part (it receives no gradient in the window phases)."""
        return self.first == 0


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """S square token maps, coarse to fine.

    sides: side of each map, strictly increasing. refine_step: first scale that uses the local window.
    kernel_size: odd window side k, one for all window scales or one for each of them.

    Raises InputError for sides that do not increase, a refine_step outside 1..S, an even window.
    """

    sides: tuple[int, ...]
    refine_step: int
    kernel_size: int | tuple[int, ...] = 7

    def __post_init__(self):
        check_sides(self.sides)
        S = len(self.sides)
        if not 1 <= self.refine_step <= S:
            raise InputError("refine_step", self.refine_step, f"1 to {S}, the number of scales")
        num_windows = S - self.refine_step
        if not isinstance(self.kernel_size, int) and len(self.kernel_size) != num_windows:
            raise InputError(
                "kernel_size", self.kernel_size, f"one window, or one for each of {num_windows} window scales"
            )
        for k in self.windows:
            check_window(k)

    @property
    def windows(self) -> tuple[int, ...]:
        """Window side of each scale from refine_step on."""
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
        """S + 1 offsets: scale l holds tokens `offsets[l] : offsets[l + 1]`."""
        return offsets_of(self.areas)

    @property
    def num_tokens(self) -> int:
        return sum(self.areas)

    def level_of_token(self) -> np.ndarray:
        """int32 [L]: the scale of every token."""
        return np.repeat(np.arange(self.num_scales, dtype=np.int32), self.areas)

    def window(self, scale: int) -> int | None:
        """Window side of a scale, or None where the scale attends to all of itself."""
        return None if scale < self.refine_step else self.windows[scale - self.refine_step]

    def scale_phase(self, scale: int, conditioning: str = "markov") -> Phase:
        """One scale on its own, as in sampling."""
        markov = BLOCK_DIAGONAL if scale < self.refine_step else WINDOW
        attention = BLOCK_CAUSAL if conditioning == "full" else markov
        return Phase(scale, scale, self.offsets[scale], self.offsets[scale + 1], attention)

    def phases(self, conditioning: str = "markov") -> tuple[Phase, ...]:
        """Markov: the joint coarse phase, then one per window scale. Full: one block-causal phase."""
        if conditioning == "full":
            return (Phase(0, self.num_scales - 1, 0, self.num_tokens, BLOCK_CAUSAL),)
        coarse = Phase(0, self.refine_step - 1, 0, self.offsets[self.refine_step], BLOCK_DIAGONAL)
        return (coarse, *(self.scale_phase(l) for l in range(self.refine_step, self.num_scales)))


def areas_of(sides: Sequence[int]) -> tuple[int, ...]:
    """Return the number of tokens of each map."""
    return tuple(side * side for side in sides)


def offsets_of(areas: Sequence[int]) -> tuple[int, ...]:
    """Return S + 1 offsets: map l holds tokens `offsets[l] : offsets[l + 1]`."""
    return tuple(itertools.accumulate(areas, initial=0))


def check_sides(sides: tuple[int, ...]) -> None:
    """Raises InputError unless sides are positive and strictly increasing."""
    if not sides or sides[0] < 1 or any(b <= a for a, b in zip(sides, sides[1:], strict=False)):
        raise InputError("sides", tuple(sides), "positive sides that strictly increase")


def check_window(kernel_size: int, field: str = "kernel_size") -> None:
    """Raises InputError unless the window side is odd and positive."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(field, kernel_size, "an odd window side of 1 or more")


def phase_of(step: int, num_phases: int, ratio: int) -> int:
    """Index of the phase that iteration `step` trains in the paper schedule (section 3.3).

    A cycle is `ratio` iterations of the coarse phase, then one iteration for each window scale. The
    published program never reaches the last scales for 1 < ratio < number of window scales; this does.
    """
    place = step % (ratio + num_phases - 1)
    return 0 if place < ratio else place - ratio + 1
