"""Inception-v3 of 2015 (Szegedy et al., arXiv 1512.00567), the network of the published FID, in Flax.

Layers and names are those of `pt_inception-2015-12-05-6726825d.pth`, batch norm folded into the convolutions. It is
not torchvision's network: it has 1008 classes, averages divide by the pixels that exist, and the last block pools by
a maximum. Products and convolutions are true float32 on every device (`Precision.HIGHEST`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mvar_jax.ops.resize import resize_tf1

SIDE = 299
POOL_WIDTH, SPATIAL_WIDTH, NUM_CLASSES = 2048, 17 * 17 * 7, 1008
HIGHEST = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """What the scores are computed from: a row for each image, float32.

    Attributes:
      pool: [N, 2048], the mean over the last map; for FID, precision and recall.
      spatial: [N, 2023], 7 channels of a 17 x 17 map, flattened y, x, channel; for sFID.
      probabilities: [N, 1008], the softmax of the last layer without its bias; for the inception score.
    """

    pool: Any
    spatial: Any
    probabilities: Any


class Unit(NamedTuple):
    """A convolution with ReLU. pool: "average" or "max" of 3 x 3 neighbours before it."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pool: str | None = None

    @property
    def padding(self) -> str:
        """Return VALID for the convolutions that shrink a map; the stem's are listed by name."""
        return "VALID" if self.stride == 2 or self.name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3") else "SAME"


SHRINK = "shrink"  # a maximum of 3 x 3 with stride 2

# A step is a unit, SHRINK, or several units side by side; a branch is a list of steps.
STEM = (
    Unit("Conv2d_1a_3x3", 32, (3, 3), 2),
    Unit("Conv2d_2a_3x3", 32, (3, 3)),
    Unit("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Unit("Conv2d_3b_1x1", 80),
    Unit("Conv2d_4a_3x3", 192, (3, 3)),
    SHRINK,
)


def _wide(pool_width: int) -> tuple:
    """Return the branches of a block on the 35 x 35 map."""
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3))),
        (Unit("branch_pool", pool_width, pool="average"),),
    )


def _middle(width: int) -> tuple:
    """Return the branches of a block on the 17 x 17 map."""
    row, column = (1, 7), (7, 1)
    return (
        (Unit("branch1x1", 192),),
        (Unit("branch7x7_1", width), Unit("branch7x7_2", width, row), Unit("branch7x7_3", 192, column)),
        (
            Unit("branch7x7dbl_1", width),
            Unit("branch7x7dbl_2", width, column),
            Unit("branch7x7dbl_3", width, row),
            Unit("branch7x7dbl_4", width, column),
            Unit("branch7x7dbl_5", 192, row),
        ),
        (Unit("branch_pool", 192, pool="average"),),
    )


def _narrow(pool: str) -> tuple:
    """Return the branches of a block on the 8 x 8 map."""

    def split(name: str) -> tuple:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    return (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), split("branch3x3_2")),
        (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3)), split("branch3x3dbl_3")),
        (Unit("branch_pool", 192, pool=pool),),
    )


BLOCKS = {
    "Mixed_5b": _wide(32),
    "Mixed_5c": _wide(64),
    "Mixed_5d": _wide(64),
    "Mixed_6a": (
        (Unit("branch3x3", 384, (3, 3), 2),),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3), 2)),
        (SHRINK,),
    ),
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
    "Mixed_7a": (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (SHRINK,),
    ),
    "Mixed_7b": _narrow("average"),
    "Mixed_7c": _narrow("max"),
}
SPATIAL_BLOCK = "Mixed_6d"  # the maps of its first branch are the spatial features


def pool3x3(x_BYXc: jax.Array, operation, edge: float | None = None, stride: int = 1) -> jax.Array:
    """Combine 3 x 3 neighbours, rows first: on a CPU five times as fast as a window reduction.

    edge: value around the map, which then keeps its size; None: windows inside the map only.
    """
    for axis in (1, 2):
        if edge is not None:
            x_BYXc = jnp.pad(x_BYXc, [(int(i == axis),) * 2 for i in range(4)], constant_values=edge)
        last = x_BYXc.shape[axis] - 3
        parts = [jax.lax.slice_in_dim(x_BYXc, i, i + last + 1, stride, axis) for i in range(3)]
        x_BYXc = functools.reduce(operation, parts)
    return x_BYXc


def average(x_BYXc: jax.Array) -> jax.Array:
    """Return the mean of the 3 x 3 neighbours that exist: 4, 6 or 9."""
    count_YX1 = pool3x3(jnp.ones((1, *x_BYXc.shape[1:3], 1), x_BYXc.dtype), jnp.add, edge=0)
    return pool3x3(x_BYXc, jnp.add, edge=0) / count_YX1


def convolve(x_BYXc: jax.Array, kernel: jax.Array, *args, precision: Any, **options) -> jax.Array:
    """Return the convolution, of a 1 x 1 kernel as one product: the same bits, and faster on a CPU."""
    if kernel.shape[:2] != (1, 1):
        return jax.lax.conv_general_dilated(x_BYXc, kernel, *args, precision=precision, **options)
    y = jnp.dot(x_BYXc.reshape(-1, x_BYXc.shape[-1]), kernel[0, 0], precision=precision)
    return y.reshape(*x_BYXc.shape[:-1], -1)


class Block(nn.Module):
    """Branches of the same input, concatenated. Returns (the maps, those of its first unit)."""

    branches: tuple
    dtype: Any

    @nn.compact
    def __call__(self, x_BYXc: jax.Array) -> tuple[jax.Array, jax.Array]:
        def apply_unit(unit: Unit, x_BYXc: jax.Array) -> jax.Array:
            if unit.pool == "max":
                x_BYXc = pool3x3(x_BYXc, jnp.maximum, edge=-jnp.inf)
            x_BYXc = nn.Conv(
                unit.width,
                unit.kernel,
                unit.stride,
                unit.padding,
                precision=HIGHEST,
                dtype=self.dtype,
                conv_general_dilated=convolve,
                name=unit.name,
            )(x_BYXc)
            if unit.pool == "average":  # after the linear 1 x 1 convolution: the same, on fewer channels
                x_BYXc = average(x_BYXc)
            return nn.relu(x_BYXc)

        def apply(step, x_BYXc: jax.Array) -> list[jax.Array]:
            if step == SHRINK:
                return [pool3x3(x_BYXc, jnp.maximum, stride=2)]
            return [apply_unit(unit, x_BYXc) for unit in ((step,) if isinstance(step, Unit) else step)]

        maps = []
        for branch in self.branches:
            found = [x_BYXc]
            for step in branch:
                found = apply(step, found[0])
            maps += found
        return jnp.concatenate(maps, -1), maps[0]


class Inception(nn.Module):
    """The whole network, from pixels to features.

    dtype: of the convolutions. bfloat16 is faster on an accelerator, and its scores are others.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels_BYX3: jax.Array) -> Features:
        """Return the features of images `[B, Y, X, 3] uint8` of any size."""
        x = resize_tf1(pixels_BYX3.astype(jnp.float32), SIDE)
        x = ((x - 128) / 128).astype(self.dtype)
        nn.share_scope(self, stem := Block((STEM,), self.dtype))
        x = stem(x)[0]
        for name, branches in BLOCKS.items():
            x, first = Block(branches, self.dtype, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = first[..., :7].reshape(len(x), -1)
        pool = x.astype(jnp.float32).mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision=HIGHEST, name="fc")(pool)
        return Features(pool, spatial.astype(jnp.float32), nn.softmax(logits))
