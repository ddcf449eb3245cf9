"""Scores of a tokenizer: reconstructions compared with their originals, and how often each code is hit.

Pixels are uint8 for all scores. Sums of consecutive images are computed part by part, and merged in any number.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mvar_jax.errors import InputError
from mvar_jax.evaluation.features import FeatureExtractor, fetch
from mvar_jax.evaluation.inception import POOL_WIDTH
from mvar_jax.evaluation.lpips import MIN_SIDE, compute_lpips
from mvar_jax.evaluation.moments import Moments, RunningMoments
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.evaluation.statistics import frechet_distance_of_moments
from mvar_jax.models.networks import Networks
from mvar_jax.ops.metrics import SSIM_WINDOW, perplexity, psnr_of_error, similarity, usage_percent
from mvar_jax.ops.pixels import as_images, check_scored, repeat_grey, to_levels
from mvar_jax.sampling.sampler import decode_in_chunks
from mvar_jax.scales import areas_of, offsets_of
from mvar_jax.sharding import make_mesh, num_shards_of, replicated, spec_of, use_mesh

CURVES = ("off", "pixels", "all")
DATA_RANGE = 255.0
HITS, ORIGINAL = "hits", "original"
PER_IMAGE, SCORES = ("mse", "ssim", "lpips"), ("psnr", "ssim", "lpips")
DTYPES = {HITS: np.int64, "mse": np.float64}


@jax.jit
def encode_scales(networks: Networks, pixels_BYX3: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return token ids `[B, L] int32` of pixels, and f_hat after each scale."""
    ids_BL = networks.apply_tokenizer(as_images(pixels_BYX3), method="encode")
    return ids_BL, networks.apply_tokenizer(ids_BL, method="f_hats")


@jax.jit
def decode_pixels(networks: Networks, f_hat_BYXc: jax.Array) -> jax.Array:
    """Return the pixels of latent maps, `[B, Y, X, 3] uint8`."""
    return to_levels(decode_in_chunks(networks, f_hat_BYXc))


@jax.jit
def compare_pixels(a_BYX3: jax.Array, b_BYX3: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the squared errors of uint8 images, summed over each row, `[B, Y] int32`; and SSIM, `[B] float32`.

    SSIM is NaN if its window is larger than the images.
    """
    difference = a_BYX3.astype(jnp.int32) - b_BYX3.astype(jnp.int32)
    errors_BY = jnp.square(difference).sum((2, 3))
    if min(a_BYX3.shape[1:3]) < SSIM_WINDOW:
        return errors_BY, jnp.full(len(a_BYX3), jnp.nan)
    return errors_BY, similarity(a_BYX3.astype(jnp.float32), b_BYX3.astype(jnp.float32), DATA_RANGE)


@jax.jit
def compare_perceptually(params: dict, a_BYX3: jax.Array, b_BYX3: jax.Array) -> jax.Array:
    """Return the LPIPS distances of uint8 images, `[B] float32`."""
    return compute_lpips(params, *(repeat_grey(as_images(x)) for x in (a_BYX3, b_BYX3)))


class TokenizerScorer:
    """A tokenizer and the networks that judge it, on all devices of this process; they share each batch.

    Args:
      networks: the tokenizer and its weights.
      inception: weights for rFID; None leaves it out.
      lpips: weights for LPIPS; None leaves it out.
      batch_size: images of a device and batch.
      curves: which scores are also computed after each number of scales: off, pixels (PSNR, SSIM, LPIPS) or all
        (rFID too).

    Attributes:
      scales: the numbers of scales, less one, after which images are decoded; the last is that of all scales.
      featured: those of `scales` that have rFID.

    Raises InputError for images that are too small for LPIPS, or another value of `curves`.
    """

    def __init__(
        self,
        networks: Networks,
        inception: NetworkWeights | None,
        lpips: NetworkWeights | None,
        batch_size: int,
        curves: str = "pixels",
    ):
        self.tokenizer, S = networks.tokenizer, len(networks.tokenizer.sides)
        if curves not in CURVES:
            expected = f"one of {', '.join(CURVES)}"
            message = f"curves must be {expected}, got {curves!r}"
            raise InputError(message, field="curves", given=curves, expected=expected)
        if lpips is not None and self.tokenizer.image_size < MIN_SIDE:
            expected = f"a tokenizer of images of {MIN_SIDE} x {MIN_SIDE} pixels or more"
            message = f"LPIPS needs {expected}, got {self.tokenizer.image_size}; leave --lpips out"
            raise InputError(message, field="lpips", given=self.tokenizer.image_size, expected=expected)
        for network, field in ((lpips, "lpips"), (inception, "inception")):
            if network is not None:
                check_scored(self.tokenizer.channels, f"--{field}")
        self._mesh = make_mesh(devices=jax.local_devices())
        self.batch_size = batch_size * num_shards_of("batch", self._mesh)
        self.scales = (S - 1,) if curves == "off" else tuple(range(S))
        self.featured = () if inception is None else self.scales if curves == "all" else (S - 1,)
        self._extractor = None if inception is None else FeatureExtractor(inception, batch_size)
        place = lambda tree: jax.device_put(tree, replicated(self._mesh))
        self._networks = Networks(self.tokenizer, place(networks.tokenizer_params))
        self._lpips = None if lpips is None else place(dict(lpips.params))

    def array_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of each array of `score`; None is the number of images."""
        K = len(self.scales)
        shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(PER_IMAGE, (K, None))
        shapes[HITS] = (len(self.tokenizer.sides), self.tokenizer.vocab_size)
        return shapes | dict.fromkeys(self.feature_names(), (None, POOL_WIDTH))

    def feature_names(self) -> list[str]:
        """Return the names of the features: of the originals, then of the images after the scales of `featured`."""
        return [ORIGINAL, *(self.scale_names()[scale] for scale in self.featured)] if self.featured else []

    def scale_names(self) -> list[str]:
        """Return the names of the features of the images after each scale."""
        return [f"scale_{scale:02d}" for scale in range(len(self.tokenizer.sides))]

    def score(self, images: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
        """Score images `[Y, X, 3] uint8`; one batch is computed while the next is read.

        Returns arrays of N images and K = len(scales):
          hits: `[S, V] int64`, how often each scale chose each code.
          mse: `[K, N] float64`, mean squared error of each image's pixels.
          ssim, lpips: `[K, N] float32`; NaN if not computed.
          original, scale_NN: `[N, 2048] float32`, the features of `feature_names`.
        """
        empty = {name: np.zeros([n or 0 for n in shape]) for name, shape in self.array_shapes().items()}
        parts = [{name: x.astype(DTYPES.get(name, np.float32)) for name, x in empty.items()}]
        parts += [self._fetch(num, arrays) for num, arrays in self._start_all(images)]
        columns = {name: [part[name] for part in parts] for name in empty}
        hits = {HITS: np.sum(columns.pop(HITS), axis=0)}
        return hits | {name: np.concatenate(x, axis=int(name in PER_IMAGE)) for name, x in columns.items()}

    def _start_all(self, images: Iterator[np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of images of each batch and its arrays on the devices, once the next one is started."""
        waiting = None
        while batch := list(itertools.islice(images, self.batch_size)):
            ready, waiting = waiting, (len(batch), self._start(batch))
            if ready is not None:
                yield ready
        if waiting is not None:
            yield waiting

    def _start(self, batch: list[np.ndarray]) -> dict[str, Any]:
        """Start the programs of a batch; a smaller one is filled with its last image."""
        filled = np.stack(batch + batch[-1:] * (self.batch_size - len(batch)))
        pixels = jax.device_put(filled, NamedSharding(self._mesh, spec_of(("batch", None, None, None))))
        found: dict[str, Any] = {"errors": [], "ssim": [], "lpips": [], "features": {}}
        with use_mesh(self._mesh):
            found["ids"], f_hats = encode_scales(self._networks, pixels)
            if self._extractor is not None:
                found["features"][ORIGINAL] = self._extractor.compute(repeat_grey(pixels))
            for scale in self.scales:
                rebuilt = decode_pixels(self._networks, f_hats[scale])
                errors_BY, ssim_B = compare_pixels(pixels, rebuilt)
                found["errors"].append(errors_BY)
                found["ssim"].append(ssim_B)
                if self._lpips is not None:
                    found["lpips"].append(compare_perceptually(self._lpips, pixels, rebuilt))
                if self._extractor is not None and scale in self.featured:
                    found["features"][self.scale_names()[scale]] = self._extractor.compute(repeat_grey(rebuilt))
        return found

    def _fetch(self, num: int, found: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the arrays of a batch's first `num` images, on the host."""
        ids_BL = np.asarray(found["ids"])[:num]
        size = self.tokenizer.channels * self.tokenizer.image_size**2
        on_host = lambda arrays: np.stack([np.asarray(x)[:num] for x in arrays])
        arrays = {HITS: count_hits(ids_BL, self.tokenizer.sides, self.tokenizer.vocab_size)}
        arrays["mse"] = on_host(found["errors"]).sum(2, dtype=np.int64) / size
        arrays["ssim"] = on_host(found["ssim"])
        arrays["lpips"] = on_host(found["lpips"]) if found["lpips"] else np.full_like(arrays["ssim"], np.nan)
        return arrays | {name: fetch(num, x).pool for name, x in found["features"].items()}


def count_hits(ids_BL: np.ndarray, sides: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return how often each scale chose each code, `[S, V] int64`."""
    spans = itertools.pairwise(offsets_of(areas_of(sides)))
    return np.stack([np.bincount(ids_BL[:, a:b].reshape(-1), minlength=vocab_size) for a, b in spans])


class Totals:
    """Sums over any number of images, from which their mean scores follow.

    Args:
      scales: of the `TokenizerScorer`.
      sides: of the tokenizer.
    """

    def __init__(self, scales: Sequence[int], sides: Sequence[int]):
        self._scales, self._sides, self.num_images = scales, sides, 0
        self._sums_3K, self._exact_K = np.zeros((3, len(scales))), np.zeros(len(scales), np.int64)
        self._hits_SV: np.ndarray | int = 0

    def add(self, part: dict[str, np.ndarray]) -> None:
        """Add the arrays of `TokenizerScorer.score`, but its features."""
        psnr_KN, is_exact_KN = psnr_of_error(part["mse"], DATA_RANGE), part["mse"] == 0
        values = np.where(is_exact_KN, 0, psnr_KN), part["ssim"], part["lpips"]
        self._sums_3K += np.stack([x.sum(1, dtype=np.float64) for x in values])
        self._exact_K += is_exact_KN.sum(1)
        self._hits_SV = self._hits_SV + part[HITS]
        self.num_images += part["mse"].shape[1]

    def scores(self) -> dict[str, Any]:
        """Return the scores of all scales together, and `by_scale`, a list; None is not computed.

        PSNR is the mean over the images whose error is not zero; `exact_images` counts the others.
        """
        by_scale = [
            {"scales": number + 1, "side": side, **_usage(hits_V), **dict.fromkeys(SCORES)}
            for number, (side, hits_V) in enumerate(zip(self._sides, self._hits_SV, strict=True))
        ]
        N = self.num_images
        for scale, (psnr, ssim, lpips), exact in zip(self._scales, self._sums_3K.T, self._exact_K, strict=True):
            psnr = psnr / (N - exact) if exact < N else np.nan
            means = {"psnr": psnr, "ssim": ssim / N, "lpips": lpips / N}
            by_scale[scale] |= {name: None if np.isnan(x) else float(x) for name, x in means.items()}
        last = {name: by_scale[-1][name] for name in SCORES}
        whole = _usage(np.sum(self._hits_SV, axis=0))
        counts = {"num_images": N, "exact_images": int(self._exact_K[-1])}
        return last | whole | counts | {"by_scale": by_scale}


def _usage(hits_V: np.ndarray) -> dict[str, float]:
    """Return the share of codes hit, the largest possible, that by the scale's own margin, and the perplexity."""
    num_hits, V = int(hits_V.sum()), len(hits_V)
    return {
        "usage_percent": 100 * float((hits_V > 0).mean()),
        "possible_percent": 100 * min(1.0, num_hits / V),
        "margin_percent": float(usage_percent(hits_V, num_hits)),
        "perplexity": perplexity(hits_V),
    }


def frechet_to_originals(names: Sequence[str], rows_of: Callable[[str], Iterable[np.ndarray]]) -> dict[str, float]:
    """Return the Frechet distance of each set of features to the first one, whose statistics are computed once.

    rows_of: name of a set -> its rows in order, some at a time. One set is in memory at a time.
    """
    original, *others = names
    first, found = _moments_of(rows_of(original)), {}
    for name in others:
        other = _moments_of(rows_of(name))
        gaussians = first.mean_D, first.covariance_DD, other.mean_D, other.covariance_DD
        found[name] = frechet_distance_of_moments(*gaussians)
    return found


def _moments_of(parts: Iterable[np.ndarray]) -> Moments:
    running = RunningMoments()
    for rows in parts:
        if len(rows):
            running.add(rows)
    return running.moments()
