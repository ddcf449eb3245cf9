"""Golden numbers of tests/golden/eval, and the weights and images that they were computed from, by a formula.

The numbers are of the published programs: guided-diffusion's evaluator on TensorFlow, torch-fidelity and lpips.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "eval"
VGG_WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256} | dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
HEAD_WIDTHS = (64, 128, 256, 512, 512)


@functools.cache
def load(name: str) -> dict:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))


def bits24(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Philox(key=np.array([zlib.crc32(name.encode()), 0], np.uint64))
    return (generator.random_raw(int(np.prod(shape))) >> np.uint64(40)).reshape(shape)


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of variance 1."""
    return (bits24(name, shape).astype(np.float32) / np.float32(2**24) - np.float32(0.5)) * np.float32(12**0.5)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a PyTorch file."""
    u = uniform(name, shape)
    if name.endswith("conv.weight") or len(shape) == 4:
        return u * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    if name.startswith("features"):
        return u * np.float32(0.1)
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * u
    if name.endswith("running_var"):
        return 1 + np.float32(0.3) * u
    return u * np.float32({"fc.weight": 0.04, "fc.bias": 0.5}.get(name, 0.2))


def images(name: str, num: int, height: int, width: int) -> np.ndarray:
    """Pixels `[N, Y, X, 3] uint8`: tiles of one colour, more and more noisy."""
    shapes = ((name, (num, height, width, 3)), (f"{name}/grid", (num, 4, 4, 3)))
    noise, grid = ((bits24(key, shape) >> np.uint64(16)).astype(int) for key, shape in shapes)
    k = (np.arange(num) % 4)[:, None, None, None]
    tiles = grid[:, np.arange(height) * 4 // height][:, :, np.arange(width) * 4 // width]
    return ((tiles * (4 - k) + noise * k) // 4).astype(np.uint8)


def sizes_of(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


@functools.cache
def inception_state() -> dict[str, np.ndarray]:
    """The tensors of the public PyTorch file, with values by the formula."""
    shapes = load("shapes.json")
    state = {name: parameter(name, tuple(shape)) for name, shape in shapes.items() if shape}
    return state | {name: np.zeros((), np.int64) for name, shape in shapes.items() if not shape}


def vgg_state() -> dict[str, np.ndarray]:
    """torchvision's VGG16 with values by the formula, and a tensor that LPIPS does not use."""
    state, width_in = {"classifier.0.bias": np.zeros(4, np.float32)}, 3
    for number, width in VGG_WIDTHS.items():
        for name, shape in (("weight", (width, width_in, 3, 3)), ("bias", (width,))):
            state[f"features.{number}.{name}"] = parameter(f"features.{number}.{name}", shape)
        width_in = width
    return state


def heads_state() -> dict[str, np.ndarray]:
    return {
        f"lin{i}.model.1.weight": np.abs(uniform(f"lin{i}", (1, width, 1, 1))) / np.float32(10)
        for i, width in enumerate(HEAD_WIDTHS)
    }
