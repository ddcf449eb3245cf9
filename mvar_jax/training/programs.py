"""The programs of a run as shapes, for a planner that compiles them without data or weights."""

from typing import Any, NamedTuple

TRAIN, SAMPLE, CACHE = PARTS = ("train", "sample", "cache")


class Program(NamedTuple):
    """A jitted function of a run, not compiled yet.

    Attributes:
      part: train (a step), sample or cache (of `cache_tokens`).
      name: what it does, in words.
      jitted: the function; call it within the mesh.
      arguments: its arguments, arrays as shapes on the mesh.
      runs: how often a whole training run calls it; 0: not part of one.
      images: that one call processes, over all devices.
      flops: of the model in one call, without recomputation; 0 if they are not counted.
      state: the part of the arguments that is a `TrainState`, or None.
    """

    part: str
    name: str
    jitted: Any
    arguments: tuple
    runs: float
    images: int
    flops: float = 0.0
    state: Any = None
