"""The case of tests/golden/loss: weights and images by a formula, for benchmarks/golden_tokenizer_loss.py too."""

import functools
from pathlib import Path

import flax.linen
import flax.traverse_util
import jax
import numpy as np
from eval_case import images, uniform

from mvar_jax.convert.names import published_shapes, to_published, to_tree, tokenizer_entries
from mvar_jax.models.discriminator import PatchDiscriminator
from mvar_jax.models.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "loss"
SIDES = (1, 2, 4, 8)
TOKENIZER = Tokenizer(
    SIDES, vocab_size=16, code_width=4, ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, num_groups=4, num_phi=2
)
ENTRIES = tokenizer_entries(TOKENIZER.ch_mult, TOKENIZER.num_res_blocks, TOKENIZER.num_phi, len(SIDES))
DISCRIMINATOR = PatchDiscriminator(layers=2, width=8)
WEIGHTS = {"l1": 0.2, "l2": 1.0, "perceptual": 1.0, "adversarial": 0.4, "lecam": 0.1}
MEANS = {"real": 0.3, "fake": -0.2}  # of the logits, before the step


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def pixels() -> np.ndarray:
    """Images `[2, 32, 32, 3] float32` in [-1, 1]."""
    return (images("loss", 2, 32, 32) / 127.5 - 1).astype(np.float32)


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a state dict, float32."""
    u = uniform(name, shape)
    if len(shape) == 4:
        return u * np.float32(np.prod(shape[1:]) ** -0.5)
    if "norm" in name and name.endswith("weight"):
        return 1 + np.float32(0.1) * u
    return u if name.endswith("embedding.weight") else u * np.float32(0.1)


@functools.cache
def tokenizer_state() -> dict[str, np.ndarray]:
    shapes = jax.eval_shape(TOKENIZER.init_params, jax.random.key(0))
    shapes = flax.linen.meta.unbox(shapes)
    return {name: formula(name, shape) for name, shape in published_shapes(ENTRIES, shapes).items()}


def tokenizer_params() -> dict:
    return to_tree(ENTRIES, tokenizer_state())


def published_gradients(tree) -> dict[str, np.ndarray]:
    return to_published(ENTRIES, jax.tree.map(np.asarray, tree))


@functools.cache
def discriminator_state() -> dict[str, np.ndarray]:
    state = {}
    for name, shape in {
        "conv0": (8, 3, 4, 4),
        "conv1": (16, 8, 4, 4),
        "conv2": (32, 16, 4, 4),
        "conv_out": (1, 32, 4, 4),
        "norm1": (16,),
        "norm2": (32,),
    }.items():
        state[f"{name}.weight"] = formula(f"D/{name}.weight", shape)
        state[f"{name}.bias"] = formula(f"D/{name}.bias", shape[:1])
    return state


def discriminator_params() -> dict:
    tree: dict = {}
    for key, value in discriminator_state().items():
        name, end = key.split(".")
        is_kernel = value.ndim == 4
        ours = {"weight": "kernel" if is_kernel else "scale", "bias": "bias"}[end]
        tree.setdefault(name, {})[ours] = value.transpose(2, 3, 1, 0) if is_kernel else value
    return tree


def published_discriminator(tree) -> dict[str, np.ndarray]:
    """Return a tree of gradients by the names of `discriminator_state`."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    arrays = {f"{name}.{names[key]}": np.asarray(x) for name, leaves in tree.items() for key, x in leaves.items()}
    return {name: x.transpose(3, 2, 0, 1) if x.ndim == 4 else x for name, x in arrays.items()}


def augmented() -> tuple[np.ndarray, np.ndarray]:
    """(images `[4, 20, 28, 4] float32`, draws `[4, 10] float32` in [0, 1))."""
    x = uniform("augment", (4, 20, 28, 4)) / np.float32(2)
    return x, uniform("augment/draws", (4, 10)) / np.float32(12**0.5) + np.float32(0.5)


@functools.cache
def dino_state() -> dict[str, np.ndarray]:
    """DINO's state dict, which holds a norm that is not used."""
    wide = {"norm1": 384, "norm2": 384, "attn.qkv": (1152, 384), "attn.proj": (384, 384)}
    wide |= {"mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    shapes: dict = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "norm.weight": (384,), "norm.bias": (384,)}
    shapes |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    for i in range(12):
        for name, shape in wide.items():
            shape = shape if isinstance(shape, tuple) else (shape,)
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    scale = lambda name, x: x * np.float32(10 * 384**-0.5) if x.ndim == 2 else x
    return {name: scale(name, formula(name, shape)) for name, shape in shapes.items()}


def head_shapes(discriminator) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the heads' variables, "params" and "spectral" in one, by "head0/conv_in/kernel"."""
    variables = jax.eval_shape(lambda: discriminator.init_variables(jax.random.key(0), (32, 32, 3)))
    flat = {}
    for kind in variables.values():
        flat |= flax.traverse_util.flatten_dict(flax.linen.meta.unbox(kind), sep="/")
    return {name: x.shape for name, x in flat.items()}


def head_state(shapes: dict) -> dict[str, np.ndarray]:
    """Heads' parameters by "head0/conv_in/kernel"."""
    found = {}
    for name, shape in shapes.items():
        u = uniform(f"H/{name}", shape)
        found[name] = 1 + np.float32(0.1) * u if name.endswith("scale") else u * np.float32(0.1)
    return found


def dino_images() -> np.ndarray:
    """Images `[1, 40, 24, 3] float32` in [-1, 1]: neither square nor of the network's size."""
    return (images("dino", 1, 40, 24) / 127.5 - 1).astype(np.float32)
