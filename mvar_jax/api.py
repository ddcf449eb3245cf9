"""`mvar_jax.load` and `Model`, the object that encodes, decodes, scores, samples and edits."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.checkpoints.class_names import ClassNames, check_labels, class_names_of
from mvar_jax.checkpoints.joining import load_both, load_switched
from mvar_jax.errors import InputError, show
from mvar_jax.files.paths import as_path
from mvar_jax.models.networks import Networks, apply_tokenizer
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy, token_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling import analysis, editing
from mvar_jax.sampling.inputs import check_cfgs, check_features, check_ids, check_images, check_index, check_rows
from mvar_jax.sampling.masks import check_mask
from mvar_jax.sampling.sampler import SampleOptions, decode_features, sample
from mvar_jax.sampling.squares import Square
from mvar_jax.scales import areas_of
from mvar_jax.values import INDEX_RANGE, MAX_INDEX, as_array, as_flag, as_integer, as_integers, as_pair, as_seed


class Model:
    """A tokenizer and, unless it stands alone, a transformer and maybe its refiner, with their weights.

    Methods take labels as class numbers or names, as the command line does: `["bee", 2]` or "bee,2". They raise
    InputError if an argument has another shape or type, or is out of range or empty, or if there is no transformer
    and they need one.

    Attributes:
      networks: the modules and their weights as one pytree.
      tokenizer, transformer: linen modules; transformer may be None.
      tokenizer_params, params: their weights.
      classes: names of the classes.
    """

    def __init__(self, networks: Networks, classes: ClassNames | None = None):
        num_classes = networks.transformer.num_classes if networks.transformer else None
        self.classes = classes or ClassNames(num_classes=num_classes)
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
        """Return L, the number of tokens of a pyramid."""
        return sum(areas_of(self.tokenizer.sides))

    def for_images(self, height: int, width: int, sides: tuple[int, ...] | None = None) -> "Model":
        """Return the tokenizer alone, for images of another size; see `Tokenizer.for_images`.

        It encodes and decodes with the same weights; the transformer samples square images of its own size alone.
        """
        tokenizer = self.tokenizer.for_images(as_integer(height, "height", 1), as_integer(width, "width", 1), sides)
        return Model(Networks(tokenizer, self.tokenizer_params))

    def labels(self, labels_B) -> np.ndarray:
        """Return class numbers or names as `[B] int32`; see `ClassNames`. Raises InputError for an unknown one."""
        return np.asarray(self._check_labels(labels_B))

    def encode(self, images_BYX3) -> jax.Array:
        """Encode images, uint8 or float in [-1, 1], to token ids `[B, L] int32`."""
        images = jnp.asarray(self._check_images(images_BYX3))
        return apply_tokenizer(self.networks, images, "encode")

    def decode(self, ids_BL) -> jax.Array:
        """Decode token ids `[B, L]` to images `[B, Y, X, 3] float32` in [-1, 1]."""
        ids = self._check_ids(ids_BL)
        f_hat = apply_tokenizer(self.networks, ids, "f_hats")[-1]
        return self.decode_features(f_hat)

    def decode_features(self, f_hat_BYXc) -> jax.Array:
        """Decode latent maps `[B, y, x, c] float32` to images `[B, Y, X, 3] float32` in [-1, 1]."""
        return decode_features(self.networks, check_features(f_hat_BYXc, self.tokenizer))

    def logits(self, ids_BL, labels_B) -> jax.Array:
        """Return the logits of every scale given the true tokens of the coarser ones, `[B, L, V] float32`.

        With a refiner also given the true tokens of the same map that are drawn earlier and that it sees.
        """
        ids, labels = self._check_ids(ids_BL), self._check_labels(labels_B)
        check_rows(labels, ids)
        return analysis.teacher_forced_logits(self._both(), ids, labels)

    def score(self, ids_BL, labels_B) -> jax.Array:
        """Return the negative log-likelihood of each map in nats, summed over its tokens, `[B, S] float32`.

        Of a refined map it is that of the joint distribution from which `sample` draws it; without a refiner tokens
        of a map are drawn independently of each other.
        """
        nll = token_cross_entropy(self.logits(ids_BL, labels_B), self._check_ids(ids_BL))
        return sum_per_scale(nll, self._transformer().pyramid.areas)

    def entropy(self, ids_BL, labels_B) -> jax.Array:
        """Return the entropy of each map's tokens in nats, given the true earlier ones and summed, `[B, S] float32`.

        A model that is as sure as it is right has the mean of `score` on images that it has not seen; a lower one is
        over-confident.
        """
        return sum_per_scale(token_entropy(self.logits(ids_BL, labels_B)), self._transformer().pyramid.areas)

    def sample(self, labels_B, seed=0, cfg=1.5, top_k=0, top_p=0.0, smooth=False, index=None, temperature=1.0):
        """Sample one image for each label; a function of (weights, label, seed, index, options).

        Args:
          labels_B: B class numbers or names.
          seed: 0 to 2**32 - 1.
          cfg, top_k, top_p, smooth, temperature: see `SampleOptions`.
          index: number of each sample, by default 0 .. B-1; samples of one seed with other indices differ.

        Returns (images `[B, Y, X, 3] float32` in [-1, 1], ids `[B, L] int32`).
        """
        options = SampleOptions(cfg, top_k, top_p, smooth, temperature)
        ids, f_hat = self.sample_features(labels_B, seed, options, index)
        return self.decode_features(f_hat), ids

    def sample_features(self, labels_B, seed: int, options: SampleOptions, index=None):
        """Sample without decoding; return (ids `[B, L] int32`, f_hat `[B, y, x, c] float32`). See `sample`."""
        labels = self._check_labels(labels_B)
        return sample(self._both(), labels, _keys(seed, index, len(labels)), options)

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
        invert=False,
    ):
        """Replace the masked part of images by samples of the given classes.

        Pixels outside the mask are returned bit for bit; those under it do not reach the model. Images of another
        size than the model's are edited in a square around the mask, see `Square`.

        Args:
          images_BYX3: uint8, or float in [-1, 1], any size; one for each label or one `[1, Y, X, 3]` for all.
          mask: of the images' size, `[Y, X]` or `[Y, X, C]` or one for each image; white or True where to draw, see
            `drawn_pixels`.
          labels_B, seed, cfg, top_k, top_p, smooth, index, temperature: as in `sample`.
          border_px: width of the fade inside the mask; by default 1/32 of the square's side.
          softness: 0 to 1, how far tokens at the mask's border are mixed, see `editing.drawn_share`.
          invert: draw what the mask keeps and keep what it draws.

        Returns (images `[B, Y, X, 3] float32` in [-1, 1], ids `[B, L] int32`).
        """
        options = SampleOptions(cfg, top_k, top_p, smooth, temperature)
        labels, images = self._check_labels(labels_B), check_images(images_BYX3, channels=self.tokenizer.channels)
        mask_BYX = check_mask(mask, *images.shape[1:3], invert)
        num = max(len(images), len(mask_BYX))
        if not {len(images), len(mask_BYX)} <= {1, num} or num not in (1, len(labels)):
            given, expected = f"{len(images)} and {len(mask_BYX)}", f"1 or {len(labels)} (as many as labels)"
            message = f"the numbers of images and masks must each be {expected}, got {given}"
            raise InputError(message, field="images", given=given, expected=expected)
        masks, images = (np.broadcast_to(x, (num, *x.shape[1:])) for x in (mask_BYX, images))
        size = self.tokenizer.image_size
        squares = [Square.around(image, mask, size) for image, mask in zip(images, masks, strict=True)]
        for square in squares:
            editing.check_border(border_px, softness, square.side)
        drawn, ids = self.edit_squares(squares, labels, seed, options, softness, index)
        pairs = zip(np.broadcast_to(squares, len(labels)), drawn, strict=True)
        return np.stack([square.paste(image, border_px) for square, image in pairs]), ids

    def edit_squares(self, squares, labels_B, seed: int, options: SampleOptions, softness: float, index=None):
        """Edit squares, one for each label or one for all, without pasting the results into their images.

        Returns (results of the model's size `[B, Y, X, 3] float32`, ids `[B, L] int32`). See `edit`.
        """
        labels = self._check_labels(labels_B)
        keys = _keys(seed, index, len(labels))
        known, masks = (np.stack(parts) for parts in zip(*(square.known() for square in squares), strict=True))
        for_all = lambda x: jnp.broadcast_to(x, (len(labels), *x.shape[1:]))
        known_ids, masks = for_all(self.encode(known)), for_all(jnp.asarray(masks, jnp.float32))
        ids, f_hat = editing.redraw(self._both(), known_ids, masks, labels, keys, options, softness)
        return np.asarray(self.decode_features(f_hat)), ids

    def progress(self, ids_BL) -> jax.Array:
        """Return the images decoded after each scale, coarse to fine, `[S, B, Y, X, 3] float32` in [-1, 1]."""
        f_hats = apply_tokenizer(self.networks, self._check_ids(ids_BL), "f_hats")
        images = self.decode_features(jnp.concatenate(f_hats))
        return images.reshape(len(f_hats), -1, *images.shape[1:])

    def sweep(self, labels_B, cfgs, seed=0, top_k=0, top_p=0.0, smooth=False, index=None, temperature=1.0):
        """Sample with the same noise at each guidance of `cfgs`, in one batch and one program for all values.

        Returns (images `[K, B, Y, X, 3] float32`, ids `[K, B, L] int32`). Other arguments are those of `sample`.
        """
        labels = self._check_labels(labels_B)
        cfgs_K = check_cfgs(cfgs)
        K, B = len(cfgs_K), len(labels)
        keys = _keys(seed, np.tile(check_index(index, B), K), K * B)
        cfg_KB = jnp.repeat(jnp.asarray(cfgs_K), B)
        # placeholder cfg=0 keeps the static options equal, so that every sweep uses one program
        options = SampleOptions(0.0, top_k, top_p, smooth, temperature)
        ids, f_hat = analysis.sample_swept(self._both(), jnp.tile(labels, K), cfg_KB, keys, options)
        images = self.decode_features(f_hat)
        return images.reshape(K, B, *images.shape[1:]), ids.reshape(K, B, -1)

    def mix_classes(self, weights_MC) -> "Model":
        """Return the model with M classes that are mixtures of its C classes' embeddings.

        weights_MC: `[M, C]`; a one-hot row is an unchanged class.
        """
        expected = f"[M, {self.num_classes}]"
        weights = as_array(weights_MC, "weights", expected)
        is_real = any(jnp.issubdtype(weights.dtype, kind) for kind in (jnp.integer, jnp.floating))
        if not is_real or weights.shape[1:] != (self.num_classes,) or not len(weights):
            given = f"{weights.dtype} {list(weights.shape)}"
            message = f"weights must be real numbers of shape {expected}, got {given}"
            raise InputError(message, field="weights", given=given, expected=expected)
        with np.errstate(over="ignore"):
            weights = weights.astype(np.float32)
        if not np.isfinite(weights).all():
            expected = "finite numbers that float32 can hold"
            message = f"weights must be {expected}, got {show(weights_MC)}"
            raise InputError(message, field="weights", given=weights_MC, expected=expected)
        return Model(analysis.mix_classes(self._both(), jnp.asarray(weights)))

    def interpolate(self, first, last, num=8, index=0, **options):
        """Sample `num` images from one class to another by linearly mixed embeddings, all with the same noise.

        Returns (images, ids) and takes the options of `sample`.
        """
        num = as_integer(num, "num", 1, MAX_INDEX, "from 1 to 2**32 - 1")
        index = as_integer(index, "index", 0, MAX_INDEX, INDEX_RANGE)
        labels = np.asarray(self._check_labels([first, last]))
        if len(labels) != 2:
            words = f"first and last must be one class each, got {first!r} and {last!r}"
            raise InputError(words, field="first", given=(first, last), expected="one class each")
        ends = np.zeros((2, self.num_classes))
        ends[[0, 1], labels] = 1
        share = np.linspace(0, 1, num)[:, None]
        mixed = self.mix_classes((1 - share) * ends[0] + share * ends[1])
        return mixed.sample(np.arange(num), index=np.full(num, index), **options)

    def score_classes(self, ids_BL, classes_C=None, batch_size=32) -> np.ndarray:
        """Return `score` under each of some classes, by default all, `[B, C, S] float32`."""
        ids = np.asarray(self._check_ids(ids_BL))
        classes = self._check_labels(np.arange(self.num_classes) if classes_C is None else classes_C)
        batch_size, parts = min(as_integer(batch_size, "batch_size", 1), len(ids)), []
        for begin in range(0, len(ids), batch_size):
            # repeated rows fill the last batch, so that all batches use one program
            rows = np.minimum(np.arange(begin, begin + batch_size), len(ids) - 1)
            parts.append(np.asarray(analysis.score_classes(self._both(), jnp.asarray(ids[rows]), classes)))
        return np.concatenate(parts)[: len(ids)]

    def classify(self, ids_BL, classes_C=None, batch_size=32) -> np.ndarray:
        """Return the probability of each of some classes, by default all, given equal priors, `[B, C] float32`."""
        from scipy.special import softmax  # slow to import

        log_p_BC = -self.score_classes(ids_BL, classes_C, batch_size).sum(axis=2, dtype=np.float64)
        return softmax(log_p_BC, axis=1).astype(np.float32)

    def _both(self) -> Networks:
        """Return the networks. Raises InputError if there is no transformer."""
        self._transformer()
        return self.networks

    def _transformer(self) -> Transformer:
        if self.transformer is None:
            message = "checkpoint holds a tokenizer alone; load a directory that also holds a transformer"
            raise InputError(message, field="checkpoint", given="a tokenizer", expected="a transformer")
        return self.transformer

    def _check_images(self, images_BYX3) -> np.ndarray:
        return check_images(images_BYX3, self.tokenizer.image_shape, self.tokenizer.channels)

    def _check_ids(self, ids_BL) -> jax.Array:
        return jnp.asarray(check_ids(ids_BL, self.tokenizer))

    def _check_labels(self, labels_B) -> jax.Array:
        num_classes = self.num_classes
        return jnp.asarray(check_labels(self.classes.numbers_of(labels_B), num_classes))


def _keys(seed, index_B, num: int) -> jax.Array:
    return keys_of_samples(as_seed(seed), check_index(index_B, num))


def load(
    path: str | Path,
    which: str = "last",
    tokenizer: str | Path | None = None,
    precision: str | None = None,
    refiner: bool = True,
    refine_scales: Sequence[int] | None = None,
    switch: tuple[int, str | Path] | None = None,
) -> Model:
    """Load a `Model` from a model directory or from the "last" or "best" checkpoint of a training workdir.

    tokenizer: directory of the tokenizer, if `path` holds a transformer alone or is to be used with another
    tokenizer; of a workdir the newest checkpoint.
    precision: standard or exact, see `ops.precision`; None for the model's own.
    refiner: use the refiner that `path` holds, if any.
    refine_scales: scales that it refines, by number from 0, rising; None for all for which it was trained.
    switch: (8, DIR): the first 8 scales are drawn, and scored, by the model of `path`, the rest by that of DIR, which
      shares the tokenizer; 0 to the number of scales. Each part uses its own refiner.

    Raises InputError if a path is neither, or holds no such checkpoint, or if there is no tokenizer, or one that does
    not fit the transformer, or if the two models of a switch differ in scales, tokenizer or classes.
    """
    path = as_path(path, "checkpoint")
    source = path, which, None if tokenizer is None else as_path(tokenizer, "tokenizer")
    if switch is None:
        networks = Networks.of(*load_both(*source))
    else:
        number, directory = as_pair(switch, "switch", "a number of scales and a directory, such as (8, DIR)")
        networks = load_switched(*source, number, as_path(directory, "switch"))
    refiner = as_flag(refiner, "refiner")
    scales = None if refine_scales is None else as_integers(refine_scales, "refine_scales")
    return Model(networks.with_refiner(refiner, scales).with_precision(precision), class_names_of(path))
