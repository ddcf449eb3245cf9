"""Features of images on the devices of this process, in batches of one shape."""

import functools
import os
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mvar_jax.errors import InputError
from mvar_jax.evaluation.inception import Features, Inception
from mvar_jax.evaluation.inception_weights import load_inception
from mvar_jax.evaluation.network_files import NetworkWeights
from mvar_jax.ops.pixels import repeat_grey
from mvar_jax.ops.platform import current_platform
from mvar_jax.sharding import make_mesh, num_shards_of, replicated, spec_of
from mvar_jax.values import as_array, as_integer

BATCH_SIZES = {"cpu": 4}  # images of a device: a larger batch leaves the caches and is slower
ACCELERATOR_BATCH_SIZE = 256
DTYPES = ("float32", "bfloat16")


def inception_features(
    images, weights: str | os.PathLike | NetworkWeights, batch_size: int | None = None, dtype: str = "float32"
) -> Features:
    """Return the features of images that FID, sFID, inception score, precision and recall are computed from.

    They are those of the published evaluator (TensorFlow's 2015 graph) to 5e-6 of the largest.

    Args:
      images: `[N, Y, X, 3] uint8`, RGB, of any size; the network resizes them itself.
      weights: the file that `mvar convert --inception` wrote, a public download, or what `load_inception` returned.
      batch_size: images of a device and batch, by default all, but at most 4 on a CPU and 256 on an accelerator.
      dtype: float32, as the published scores; bfloat16 is faster and gives other scores.

    Returns:
      `pool` [N, 2048], `spatial` [N, 2023] and `probabilities` [N, 1008], float32 numpy.

    Raises:
      InputError: the images or the weights are not of this form.
    """
    pixels = check_pixels(images)
    batch_size = min(default_batch_size(), len(pixels)) if batch_size is None else batch_size
    extractor = FeatureExtractor(load_inception(weights), batch_size, dtype)
    size = extractor.batch_size
    parts = list(extractor.stream(pixels[i : i + size] for i in range(0, len(pixels), size)))
    return Features(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def default_batch_size() -> int:
    """Return the images of a device and batch that fill this platform."""
    return BATCH_SIZES.get(current_platform(), ACCELERATOR_BATCH_SIZE)


def check_pixels(images) -> np.ndarray:
    """Return images as `[N, Y, X, 3] uint8`, grey ones `[N, Y, X, 1]` three times. Raises InputError for others."""
    expected = "uint8 [N, Y, X, 3] with at least one image"
    pixels = repeat_grey(as_array(images, "images", expected))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        given = f"{pixels.dtype} {list(pixels.shape)}"
        message = f"images must be {expected}, got {given}; mvar_jax.files.images.to_uint8 converts floats in [-1, 1]"
        raise InputError(message, field="images", given=given, expected=expected)
    return pixels


@functools.partial(jax.jit, static_argnames="dtype")
def compute_features(params: dict, pixels_BYX3: jax.Array, dtype: str = "float32") -> Features:
    """Return the features of a batch `[B, Y, X, 3] uint8`, float32."""
    return Inception(jnp.dtype(dtype).type).apply({"params": params}, pixels_BYX3)


class FeatureExtractor:
    """The network on all devices of this process; they share each batch.

    Attributes:
      batch_size: images of a batch, of all devices together.
      weights: with the fingerprint of the network.
    """

    def __init__(self, weights: NetworkWeights, batch_size: int | None = None, dtype: str = "float32"):
        if dtype not in DTYPES:
            expected = " or ".join(DTYPES)
            message = f"dtype must be {expected}, got {dtype!r}"
            raise InputError(message, field="dtype", given=dtype, expected=expected)
        batch_size = default_batch_size() if batch_size is None else as_integer(batch_size, "batch_size", 1)
        mesh = make_mesh(devices=jax.local_devices())
        self.weights, self.dtype = weights, dtype
        self.batch_size = batch_size * num_shards_of("batch", mesh)
        self._params = jax.device_put(dict(weights.params), replicated(mesh))
        self._sharding = NamedSharding(mesh, spec_of(("batch", None, None, None)))

    def stream(self, batches: Iterable[np.ndarray], reads_ahead: bool = True) -> Iterator[Features]:
        """Yield the features of each batch of at most `batch_size` images.

        reads_ahead: take the next batch while the devices compute this one; if False, they rest when it is taken.

        Smaller batches are filled up, so that all images of a size share one program. Raises InputError for a batch
        that is not uint8 images or too large.
        """
        pending: tuple[int, Features] | None = None
        for batch in batches:
            pixels = check_pixels(batch)
            if len(pixels) > self.batch_size:
                expected = f"at most {self.batch_size} images"
                message = f"a batch must have {expected}, got {len(pixels)}"
                raise InputError(message, field="images", given=len(pixels), expected=expected)
            rows = np.minimum(np.arange(self.batch_size), len(pixels) - 1)
            filled = pixels if len(pixels) == self.batch_size else pixels[rows]
            features = self.compute(filled)
            if not reads_ahead:
                yield fetch(len(pixels), features)
                continue
            if pending is not None:
                yield fetch(*pending)
            pending = len(pixels), features
        if pending is not None:
            yield fetch(*pending)

    def compute(self, pixels_BYX3) -> Features:
        """Return the features of a batch of `batch_size` uint8 images, on the devices, without waiting for them."""
        return compute_features(self._params, jax.device_put(pixels_BYX3, self._sharding), self.dtype)


def fetch(num: int, features: Features) -> Features:
    """Return the first rows on the host. Raises InputError if they are not finite."""
    found = Features(*(np.asarray(x)[:num] for x in features))
    if not all(np.isfinite(x).all() for x in found):
        message = "features must be finite, got NaN or infinity: the weights are damaged or overflow in this dtype"
        raise InputError(message, field="features", expected="finite numbers")
    return found
