"""The maps, windows and heads that the tests and window_attention.py run every backend on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `local_window_attention`."""

    height: int
    width: int
    window: int
    num_heads: int
    head_width: int
    batch: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.height}x{self.width}k{self.window}h{self.num_heads}w{self.head_width}{self.dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.height, self.width, self.num_heads, self.head_width)


# each kind of map, window and head once: small to large, rectangular, window larger than one side or both
CASES = (
    Case(5, 7, 3, 1, 16, batch=2),
    Case(5, 7, 9, 2, 24),
    Case(4, 11, 5, 3, 32, batch=2),
    Case(8, 8, 9, 24, 16),
    Case(9, 12, 5, 2, 128),
    Case(13, 13, 7, 2, 64, batch=2),
    Case(13, 13, 7, 2, 64, dtype="bfloat16"),
    Case(16, 16, 7, 3, 96),
    Case(16, 16, 9, 2, 64, batch=2, dtype="bfloat16"),
    Case(24, 24, 7, 2, 48),
    Case(32, 32, 7, 2, 64, dtype="bfloat16"),
    Case(20, 45, 3, 2, 32),
    Case(48, 48, 7, 1, 64),
    Case(64, 64, 7, 1, 64),
)

# sides that benchmarks time, from the pyramids of 256, 512 and 1024 pixels; heads of MVAR-d16
BENCHMARK_SIDES = (8, 10, 13, 16, 24, 32, 48, 64)
# side of each map that accelerator.py times -> batch size
TIMED_MAPS = {13: 64, 16: 64, 32: 64, 64: 16}


def benchmark_case(side: int, batch: int, dtype: str, window: int = 7) -> Case:
    return Case(side, side, window, 16, 64, batch, dtype)
