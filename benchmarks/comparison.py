"""Shared parts of the parity comparisons: tolerances, the table of worst differences, our model of two files."""

import tempfile
from pathlib import Path

import jax
import numpy as np

import mvar_jax
from mvar_jax.api import Model
from mvar_jax.convert.weights import convert
from mvar_jax.models.networks import Networks
from mvar_jax.models.transformer import previous_of

# for float32 on a CPU: absolute, relative for losses, a number for ids; 1e-4 for logits would not catch a LayerNorm
# eps of 1e-5
TOLERANCES = {
    "f": 1e-4,
    "ids": 0,
    "f_hat": 1e-5,
    "images": 5e-5,
    "teacher-forcing input": 1e-5,
    "logits": 4e-5,
    "guided logits": 1e-4,
    "losses": 1e-6,
    "near tie": 1e-3,  # squared distance; the golden ids have margins of 3e-3 and more
}


class Table:
    """Rows `quantity | worst difference | tolerance | ok`.

    has_magnitude: multiply an absolute tolerance by the reference's largest value if that is above 1, because the
    tolerances were set on golden values of about 1.
    """

    def __init__(self, has_magnitude: bool = False):
        self.rows, self.has_magnitude = [], has_magnitude

    def add(self, quantity: str, kind: str, *pairs) -> None:
        """Add the worst difference of all (ours, reference) pairs. kind: a key of TOLERANCES."""
        pairs = [(np.asarray(ours, np.float64), np.asarray(theirs, np.float64)) for ours, theirs in pairs]
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise ValueError(f"{quantity} must have shape {theirs.shape} as in the reference, got {ours.shape}")
        if kind == "ids":
            worst = sum(int(np.sum(ours != theirs)) for ours, theirs in pairs)
            self.rows.append((quantity, str(worst), f"{TOLERANCES[kind]}", worst <= TOLERANCES[kind]))
            return
        relative = kind == "losses"
        gap = lambda ours, theirs: np.max(np.abs(ours - theirs) / (np.abs(theirs) if relative else 1))
        worst, tolerance = max(gap(*pair) for pair in pairs), TOLERANCES[kind]
        if self.has_magnitude and not relative:
            tolerance *= max(1.0, *(np.max(np.abs(theirs)) for _, theirs in pairs))
        # this order makes NaN fail
        self.rows.append((quantity, f"{worst:.1e}", f"{tolerance:.1e}", bool(worst <= tolerance)))

    @property
    def is_ok(self) -> bool:
        return all(row[-1] for row in self.rows)

    def __str__(self) -> str:
        cells = [("quantity", "worst difference", "tolerance", "ok")]
        cells += [(*row[:3], "yes" if row[3] else "NO") for row in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        cells.insert(1, tuple("-" * width for width in widths))
        return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


class Compiled:
    """A module with compiled `apply`, so that samples with different options share one program per scale."""

    def __init__(self, module):
        self.module = module
        self.apply = jax.jit(module.apply, static_argnums=3, static_argnames="method")

    def __getattr__(self, name):
        return getattr(self.module, name)


def load_published_files(tokenizer: Path, transformer: Path, **options) -> Model:
    """Load our model of two published files by way of a model directory on disk."""
    with tempfile.TemporaryDirectory() as folder:
        convert(tokenizer, transformer, Path(folder) / "model", **options)
        return mvar_jax.load(Path(folder) / "model")


@jax.jit
def tokenizer_forward(networks: Networks, images_BYX3):
    """Return (f, (raw reconstruction, quantizer loss, Encoded)) of the training forward pass."""
    both = lambda module, images: (module.features(images), module(images))
    return networks.apply_tokenizer(images_BYX3, method=both)


@jax.jit
def teacher_forced(networks: Networks, previous_BMc, labels_B):
    """Return the logits of each phase; a label may be num_classes, "no class"."""
    transformer, variables = networks.transformer, {"params": networks.params}
    num_start = transformer.pyramid.areas[0]
    run = lambda phase: transformer.apply(variables, previous_of(previous_BMc, phase, num_start), labels_B, phase)
    return [run(phase)[0] for phase in transformer.phases()]


def channels_first(x_BYXc) -> np.ndarray:
    return np.moveaxis(np.asarray(x_BYXc), -1, -3)
