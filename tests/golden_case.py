"""The golden case `tiny`: numbers that the published programs produced on random weights, and how to compare them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from mvar_jax.convert.names import to_published, tokenizer_entries, transformer_entries
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.scales import KNOWN_SIDES

FOLDER = Path(__file__).parent / "golden"
SIDES = KNOWN_SIDES[256]

# float32 on a CPU; never loosened: a LayerNorm eps of 1e-5 already passes logits at 1e-4
LOGITS = {"atol": 4e-5}
GUIDED_LOGITS = {"atol": 1e-4}
FEATURES = {"atol": 1e-4}
F_HAT = {"atol": 1e-5}
IMAGES = {"atol": 5e-5}
LOSSES = {"rtol": 1e-6}
GRADIENTS = {"rtol": 2e-4, "atol": 1e-6}
TOKENIZER_GRADIENTS = {"rtol": 1e-3, "atol": 1e-6}
WINDOW_ATTENTION = {"atol": 2e-5}
OPTIMIZER = {"rtol": 1e-6}

TOKENIZER = Tokenizer(SIDES, vocab_size=64, code_width=8, ch=32)
MVAR = Transformer(
    SIDES,
    refine_step=8,
    kernel_size=7,
    vocab_size=64,
    code_width=8,
    num_classes=10,
    depth=2,
    width=64,
    num_heads=2,
)
VAR = MVAR.clone(conditioning="full")
TOKENIZER_ENTRIES = tokenizer_entries(TOKENIZER.ch_mult, TOKENIZER.num_res_blocks, TOKENIZER.num_phi, len(SIDES))
TRANSFORMER_ENTRIES = transformer_entries(MVAR.depth, MVAR.num_heads, shared_aln=False)


# compiling is most of a test's time, and half of that is LLVM's work on programs that run once
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.lru_cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / "tiny" / f"{name}.npz") as arrays:
        return dict(arrays)


@functools.lru_cache
def load_json(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


def assert_close(what: str, ours, golden, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Elementwise |ours - golden| <= atol + rtol * |golden|."""
    np.testing.assert_allclose(np.asarray(ours), golden, rtol=rtol, atol=atol, err_msg=what)


def channels_first(x) -> np.ndarray:
    """[..., Y, X, C] -> [..., C, Y, X], the layout of the golden arrays."""
    return np.moveaxis(np.asarray(x), -1, -3)


def assert_images_close(what: str, images_BYX3, golden: dict, name: str, grid: int) -> None:
    """Compares a grid of pixels, a seeded subset and the statistics of each image and channel."""
    x = channels_first(images_BYX3)
    assert x.shape == tuple(golden[f"{name}_shape"])
    assert_close(f"{what} grid", x[:, :, ::grid, ::grid], golden[f"{name}_grid{grid}"], **IMAGES)
    assert_close(f"{what} subset", x.reshape(-1)[golden[f"{name}_idx"]], golden[f"{name}_val"], **IMAGES)
    assert_close(f"{what} mean", x.mean((2, 3), dtype=np.float64), golden[f"{name}_mean"], **IMAGES)
    assert_close(f"{what} std", x.std((2, 3), dtype=np.float64), golden[f"{name}_std"], **IMAGES)


def assert_gradients_close(what: str, published: dict, golden: dict, prefix: str, tolerance: dict) -> None:
    """Compares the norm of every gradient, and the gradients that are stored in full or as a subset."""
    names = golden[f"{prefix}_names"].tolist()
    assert set(names) == set(published)
    for name, norm in zip(names, golden[f"{prefix}_norms"], strict=True):
        if norm == -1:  # receives none: exact zeros here
            np.testing.assert_array_equal(published[name], 0, err_msg=f"{what} {name}")
        else:
            ours = np.linalg.norm(published[name].astype(np.float64))
            assert_close(f"{what} norm of {name}", ours, norm, **tolerance)
    for key, value in golden.items():
        kind, _, name = key.partition("/")
        if kind == prefix:
            assert_close(f"{what} {name}", published[name], value, **tolerance)
        elif kind == f"{prefix}_val":
            ours = published[name].reshape(-1)[golden[f"{prefix}_idx/{name}"]]
            assert_close(f"{what} subset of {name}", ours, value, **tolerance)


def published_transformer(tree) -> dict[str, np.ndarray]:
    return to_published(TRANSFORMER_ENTRIES, jax.tree.map(np.asarray, tree))


def published_tokenizer(tree) -> dict[str, np.ndarray]:
    return to_published(TOKENIZER_ENTRIES, jax.tree.map(np.asarray, tree))


class Compiled:
    """A module whose `apply` is compiled, so that the sampler's options share one program for each scale."""

    def __init__(self, module, static_argnums=(3,)):
        self.module = module
        self.apply = quick_jit(module.apply, static_argnums=static_argnums, static_argnames=("method",))

    def __getattr__(self, name):
        return getattr(self.module, name)
