"""`mvar_jax.load`: one object that encodes, decodes, scores and samples, for notebooks and other people's code."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.errors import InputError
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.sampling.sampler import SampleOptions, decode_in_turns, keys_of_samples, sample
from mvar_jax.store import load_model
from mvar_jax.training.transformer_step import previous_of


@functools.partial(jax.jit, static_argnames=("tokenizer", "method"))
def apply_tokenizer(tokenizer: Tokenizer, params, x: jax.Array, method: str) -> jax.Array:
    """A method of the tokenizer, compiled once for all its callers."""
    return tokenizer.apply({"params": params}, x, method=method)


@functools.partial(jax.jit, static_argnames=("tokenizer",))
def decode_features(tokenizer: Tokenizer, params, f_hat_BYXc: jax.Array) -> jax.Array:
    """float32 images in [-1, 1], some at a time."""
    return decode_in_turns(tokenizer, params, f_hat_BYXc)


@functools.partial(jax.jit, static_argnames=("model", "tokenizer"))
def _teacher_forced_logits(model, tokenizer, params, tokenizer_params, ids_BL, labels_B):
    previous = tokenizer.apply({"params": tokenizer_params}, ids_BL, method="teacher_forcing")
    num_start = model.pyramid.areas[0]
    parts = [
        model.apply({"params": params}, previous_of(previous, phase, num_start), labels_B, phase)[0]
        for phase in model.phases()
    ]
    return jnp.concatenate(parts, axis=1)


class Model:
    """A tokenizer and, where the directory holds one, a transformer, with their weights.

    Attributes: tokenizer, transformer (linen modules; transformer may be None), tokenizer_params, params.
    """

    def __init__(self, modules: dict, params: dict):
        self.tokenizer: Tokenizer = modules["tokenizer"]
        self.tokenizer_params = jax.tree.map(jnp.asarray, params["tokenizer"])
        self.transformer: Transformer | None = modules.get("transformer")
        self.params = jax.tree.map(jnp.asarray, params.get("transformer"))

    @property
    def num_classes(self) -> int:
        return self._transformer().num_classes

    @property
    def num_tokens(self) -> int:
        return sum(side * side for side in self.tokenizer.sides)

    def encode(self, images_BYX3) -> jax.Array:
        """Float images in [-1, 1] -> token ids int32 [B, L]. Raises InputError for another image size."""
        images = jnp.asarray(images_BYX3, jnp.float32)
        size = self.tokenizer.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise InputError("images", tuple(images.shape), f"shape [B, {size}, {size}, 3]")
        return apply_tokenizer(self.tokenizer, self.tokenizer_params, images, "encode")

    def decode(self, ids_BL) -> jax.Array:
        """Token ids [B, L] -> float32 images [B, Y, X, 3] in [-1, 1]."""
        ids = self._check_ids(ids_BL)
        f_hat = apply_tokenizer(self.tokenizer, self.tokenizer_params, ids, "f_hats")[-1]
        return self.decode_features(f_hat)

    def decode_features(self, f_hat_BYXc) -> jax.Array:
        """Latent maps float32 [B, y, x, c] -> float32 images in [-1, 1]."""
        return decode_features(self.tokenizer, self.tokenizer_params, f_hat_BYXc)

    def logits(self, ids_BL, labels_B) -> jax.Array:
        """Teacher-forced logits of every scale, no dropout: float32 [B, L, V]."""
        ids, labels = self._check_ids(ids_BL), self._check_labels(labels_B)
        return _teacher_forced_logits(
            self._transformer(), self.tokenizer, self.params, self.tokenizer_params, ids, labels
        )

    def score(self, ids_BL, labels_B) -> jax.Array:
        """Negative log-likelihood in nats, summed over each map's tokens: float32 [B, S]."""
        nll = token_cross_entropy(self.logits(ids_BL, labels_B), self._check_ids(ids_BL))
        return sum_per_scale(nll, self._transformer().pyramid.areas)

    def sample(self, labels_B, seed=0, cfg=1.5, top_k=0, top_p=0.0, smooth=False, index=None):
        """Draws one image for each label: (float32 images in [-1, 1], ids int32 [B, L]).

        index: the samples' numbers, 0 .. B-1 if None. A picture is a function of (weights, label, seed, its
        number, options). Raises InputError for labels or options out of range.
        """
        ids, f_hat = self.sample_features(labels_B, seed, SampleOptions(cfg, top_k, top_p, smooth), index)
        return self.decode_features(f_hat), ids

    def sample_features(self, labels_B, seed: int, options: SampleOptions, index=None):
        """(ids int32 [B, L], f_hat float32 [B, y, x, c]) of a draw, not decoded; see `sample`."""
        options.check()
        labels = self._check_labels(labels_B)
        keys = keys_of_samples(seed, np.arange(len(labels)) if index is None else index)
        return sample(self._transformer(), self.tokenizer, self.params, self.tokenizer_params, labels, keys, options)

    def _transformer(self) -> Transformer:
        if self.transformer is None:
            raise InputError("checkpoint", "a tokenizer alone", "a directory that holds a transformer too")
        return self.transformer

    def _check_ids(self, ids_BL) -> jax.Array:
        ids, V = np.asarray(ids_BL), self.tokenizer.vocab_size
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens or not np.issubdtype(ids.dtype, np.integer):
            raise InputError("ids", f"{ids.dtype}{ids.shape}", f"integers of shape [B, {self.num_tokens}]")
        if ids.size and not (ids.min() >= 0 and ids.max() < V):
            raise InputError("ids", f"{ids.min()} to {ids.max()}", f"ids from 0 to {V - 1}")
        return jnp.asarray(ids, jnp.int32)

    def _check_labels(self, labels_B) -> jax.Array:
        return jnp.asarray(check_labels(labels_B, self.num_classes), jnp.int32)


def check_labels(labels_B, num_classes: int) -> np.ndarray:
    """int32 [B]. Raises InputError naming the first label outside 0 .. num_classes - 1."""
    labels = np.asarray(labels_B)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError("labels", labels.tolist(), "a list of integers")
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise InputError("labels", int(bad[0]), f"class labels from 0 to {num_classes - 1}")
    return labels.astype(np.int32)


def load(path: str | Path, which: str = "last") -> Model:
    """A `Model` from a model directory or a training workdir, of which it takes the "last" or the "best" checkpoint.

    Raises InputError where it is neither.
    """
    modules, params = load_model(Path(path), which)
    if "tokenizer" not in modules:
        raise InputError("checkpoint", str(path), "a directory that holds a tokenizer")
    return Model(modules, params)
