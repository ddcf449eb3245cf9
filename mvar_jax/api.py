"""`mvar_jax.load`: one object that encodes, decodes, scores and samples, for notebooks and other people's code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from mvar_jax.checkpoints.class_names import ClassNames, class_names_of
from mvar_jax.checkpoints.model_directory import load_model
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks, apply_tokenizer
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling import analysis, editing
from mvar_jax.sampling.sampler import SampleOptions, decode_features, sample
from mvar_jax.scales import areas_of


class Model:
    """A tokenizer and, where the directory holds one, a transformer, with their weights.

    Attributes: tokenizer, transformer (linen modules; transformer may be None), tokenizer_params, params, networks
    (all four as one pytree), classes (their names; labels may be given by name wherever a method takes them).
    """

    def __init__(self, networks: Networks, classes: ClassNames | None = None):
        self.classes = classes or ClassNames()
        self.networks = jax.tree.map(jnp.asarray, networks)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.networks.tokenizer

    @property
    def tokenizer_params(self) -> dict:
        return self.networks.tokenizer_params

    @property
    def transformer(self) -> Transformer | None:
        return self.networks.transformer

    @property
    def params(self) -> dict | None:
        return self.networks.params

    @params.setter
    def params(self, params: dict) -> None:
        self.networks = self.networks.replace(params=params)

    @property
    def num_classes(self) -> int:
        return self._transformer().num_classes

    @property
    def num_tokens(self) -> int:
        return sum(areas_of(self.tokenizer.sides))

    def labels(self, labels_B) -> np.ndarray:
        """Numbers or names of classes as int32 [B]. Raises InputError for unknown ones."""
        return np.asarray(self._check_labels(labels_B))

    def encode(self, images_BYX3) -> jax.Array:
        """Float images in [-1, 1] -> token ids int32 [B, L]. Raises InputError for another image size."""
        images = jnp.asarray(self._check_images(images_BYX3))
        return apply_tokenizer(self.networks, images, "encode")

    def decode(self, ids_BL) -> jax.Array:
        """Token ids [B, L] -> float32 images [B, Y, X, 3] in [-1, 1]."""
        ids = self._check_ids(ids_BL)
        f_hat = apply_tokenizer(self.networks, ids, "f_hats")[-1]
        return self.decode_features(f_hat)

    def decode_features(self, f_hat_BYXc) -> jax.Array:
        """Latent maps float32 [B, y, x, c] -> float32 images in [-1, 1]."""
        return decode_features(self.networks, f_hat_BYXc)

    def logits(self, ids_BL, labels_B) -> jax.Array:
        """Teacher-forced logits of every scale, no dropout: float32 [B, L, V]."""
        ids, labels = self._check_ids(ids_BL), self._check_labels(labels_B)
        return analysis.teacher_forced_logits(self._both(), ids, labels)

    def score(self, ids_BL, labels_B) -> jax.Array:
        """Negative log-likelihood in nats, summed over each map's tokens: float32 [B, S]."""
        nll = token_cross_entropy(self.logits(ids_BL, labels_B), self._check_ids(ids_BL))
        return sum_per_scale(nll, self._transformer().pyramid.areas)

    def sample(self, labels_B, seed=0, cfg=1.5, top_k=0, top_p=0.0, smooth=False, index=None, temperature=1.0):
        """Draws one image for each label: (float32 images in [-1, 1], ids int32 [B, L]).

        index: the samples' numbers, 0 .. B-1 if None. A picture is a function of (weights, label, seed, its
        number, options). Raises InputError for labels or options out of range.
        """
        options = SampleOptions(cfg, top_k, top_p, smooth, temperature)
        ids, f_hat = self.sample_features(labels_B, seed, options, index)
        return self.decode_features(f_hat), ids

    def sample_features(self, labels_B, seed: int, options: SampleOptions, index=None):
        """(ids int32 [B, L], f_hat float32 [B, y, x, c]) of a draw, not decoded; see `sample`."""
        labels = self._check_labels(labels_B)
        keys = keys_of_samples(seed, np.arange(len(labels)) if index is None else index)
        return sample(self._both(), labels, keys, options)

    def edit(
        self,
        images_BYX3,
        mask,
        labels_B,
        seed=0,
        cfg=1.5,
        top_k=0,
        top_p=0.0,
        smooth=False,
        border_px=None,
        softness=editing.SOFTNESS,
        index=None,
        temperature=1.0,
    ):
        """Draws the masked part anew as the given classes: (float32 images in [-1, 1], ids int32 [B, L]).

        images: float in [-1, 1], one for each label or one [1, Y, X, 3] for all. mask [Y, X] or one for each: True or
        above 0 where to draw; pixels outside it come back to the bit. border_px: how far into the mask the drawn
        pixels fade in (None: 1/32 of the side); softness: of the tokens' border, see `drawn_share`. What lies under
        the mask is not seen; the rest as in `sample`. Raises InputError for sizes or options that do not fit.
        """
        options = SampleOptions(cfg, top_k, top_p, smooth, temperature)
        labels, size = self._check_labels(labels_B), self.tokenizer.image_size
        border_px = editing.check_border(border_px, softness, size)
        mask_BYX = editing.check_mask(mask, size)
        images = self._check_images(images_BYX3)
        num = max(len(images), len(mask_BYX))
        if not {len(images), len(mask_BYX)} <= {1, num} or num not in (1, len(labels)):
            given = f"{len(images)} images, {len(mask_BYX)} masks"
            raise InputError("images", given, f"1 of each, or as many as labels: {len(labels)}")
        mask_BYX = np.broadcast_to(mask_BYX, (num, size, size))
        before = editing.hide_masked(np.broadcast_to(images, (num, size, size, 3)), mask_BYX)
        for_all = lambda x: jnp.broadcast_to(x, (len(labels), *x.shape[1:]))
        known = for_all(self.encode(before)), for_all(jnp.asarray(mask_BYX, jnp.float32))
        keys = keys_of_samples(seed, np.arange(len(labels)) if index is None else index)
        ids, f_hat = editing.redraw(self._both(), *known, labels, keys, options, softness)
        return editing.blend(before, np.asarray(self.decode_features(f_hat)), mask_BYX, border_px), ids

    def progress(self, ids_BL) -> jax.Array:
        """The pictures after each scale, coarse to fine: float32 [S, B, Y, X, 3] in [-1, 1]."""
        f_hats = apply_tokenizer(self.networks, self._check_ids(ids_BL), "f_hats")
        images = self.decode_features(jnp.concatenate(f_hats))
        return images.reshape(len(f_hats), -1, *images.shape[1:])

    def sweep(self, labels_B, cfgs, seed=0, top_k=0, top_p=0.0, smooth=False, index=None, temperature=1.0):
        """The same draws at each guidance of `cfgs`: (images float32 [K, B, Y, X, 3], ids int32 [K, B, L]).

        All in one batch and one program, whatever the values. Raises InputError as `sample` does.
        """
        labels = self._check_labels(labels_B)
        for cfg in cfgs:
            SampleOptions(cfg, top_k, top_p, smooth, temperature)  # checks itself
        K, B = len(cfgs), len(labels)
        keys = keys_of_samples(seed, np.tile(np.arange(B) if index is None else index, K))
        cfg_KB = jnp.repeat(jnp.asarray(cfgs, jnp.float32), B)
        # cfg 0: `cfgs` take its place, and the program is the same for all
        options = SampleOptions(0.0, top_k, top_p, smooth, temperature)
        ids, f_hat = analysis.sample_swept(self._both(), jnp.tile(labels, K), cfg_KB, keys, options)
        images = self.decode_features(f_hat)
        return images.reshape(K, B, *images.shape[1:]), ids.reshape(K, B, -1)

    def mix_classes(self, weights_MC) -> "Model":
        """The same model with M classes in place of its C, each a mixture of their embeddings.

        weights: [M, C]; a row of one 1 is a class as it was. Raises InputError for another width.
        """
        weights = np.asarray(weights_MC, np.float32)
        if weights.ndim != 2 or weights.shape[1] != self.num_classes or not np.isfinite(weights).all():
            raise InputError("weights", tuple(weights.shape), f"finite numbers [M, {self.num_classes}]")
        return Model(analysis.mix_classes(self._both(), jnp.asarray(weights)))

    def interpolate(self, first, last, num=8, index=0, **options):
        """`num` pictures from one class to another, all with the same noise: (images, ids) as `sample` gives them.

        Embeddings are mixed linearly. options: those of `sample`.
        """
        ends = np.eye(self.num_classes)[np.asarray(self._check_labels([first, last]))]
        share = np.linspace(0, 1, num)[:, None]
        mixed = self.mix_classes((1 - share) * ends[0] + share * ends[1])
        return mixed.sample(np.arange(num), index=np.full(num, index), **options)

    def score_classes(self, ids_BL, classes_C=None, batch_size=32) -> np.ndarray:
        """`score` under each of some classes (None: all): nats, float32 [B, C, S]. Padded batches, one program."""
        ids = np.asarray(self._check_ids(ids_BL))
        classes = self._check_labels(np.arange(self.num_classes) if classes_C is None else classes_C)
        batch_size, parts = min(batch_size, len(ids)), []
        for begin in range(0, len(ids), batch_size):
            rows = np.minimum(np.arange(begin, begin + batch_size), len(ids) - 1)
            parts.append(np.asarray(analysis.score_classes(self._both(), jnp.asarray(ids[rows]), classes)))
        return np.concatenate(parts)[: len(ids)]

    def classify(self, ids_BL, classes_C=None, batch_size=32) -> np.ndarray:
        """Probability of each of some classes (None: all) by Bayes' rule, all as likely before: float32 [B, C]."""
        log_p_BC = -self.score_classes(ids_BL, classes_C, batch_size).sum(axis=2, dtype=np.float64)
        return softmax(log_p_BC, axis=1).astype(np.float32)

    def _both(self) -> Networks:
        """Return the networks. Raises InputError if there is no transformer."""
        self._transformer()
        return self.networks

    def _transformer(self) -> Transformer:
        if self.transformer is None:
            raise InputError("checkpoint", "a tokenizer alone", "a directory that holds a transformer too")
        return self.transformer

    def _check_images(self, images_BYX3) -> np.ndarray:
        images, size = np.asarray(images_BYX3, np.float32), self.tokenizer.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise InputError("images", tuple(images.shape), f"shape [B, {size}, {size}, 3]")
        return images

    def _check_ids(self, ids_BL) -> jax.Array:
        ids, V = np.asarray(ids_BL), self.tokenizer.vocab_size
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens or not np.issubdtype(ids.dtype, np.integer):
            raise InputError("ids", f"{ids.dtype}{ids.shape}", f"integers of shape [B, {self.num_tokens}]")
        if ids.size and not (ids.min() >= 0 and ids.max() < V):
            raise InputError("ids", f"{ids.min()} to {ids.max()}", f"ids from 0 to {V - 1}")
        return jnp.asarray(ids, jnp.int32)

    def _check_labels(self, labels_B) -> jax.Array:
        if isinstance(labels_B, (list, tuple)):
            labels_B = [self.classes.find(label) if isinstance(label, str) else label for label in labels_B]
        return jnp.asarray(check_labels(labels_B, self.num_classes), jnp.int32)


def check_labels(labels_B, num_classes: int) -> np.ndarray:
    """int32 [B]. Raises InputError naming the first label outside 0 .. num_classes - 1."""
    labels = np.asarray(labels_B)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError("labels", labels.tolist(), "a list of integers, or of names of classes")
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
    return Model(Networks.of(modules, params), class_names_of(Path(path)))
