"""A stand-in for the Inception network that needs no compilation: few features, which are sums of pixels."""

import numpy as np

from mvar_jax.evaluation import feature_folder, inception_weights, reference, scoring
from mvar_jax.evaluation.inception import Features
from mvar_jax.evaluation.network_files import NetworkWeights

WIDTHS = Features(6, 4, 5)


class NarrowExtractor:
    """Features of images as `FeatureExtractor` gives them; counts the images that it sees."""

    num_seen = 0

    def __init__(self, weights, batch_size=None, dtype="float32"):
        self.batch_size, self.dtype = batch_size or 8, dtype

    def stream(self, batches, reads_ahead=True):
        for pixels in batches:
            NarrowExtractor.num_seen += len(pixels)
            yield features_of(pixels, self.dtype)


def features_of(pixels_NYX3, dtype: str = "float32") -> Features:
    x_ND = pixels_NYX3.reshape(len(pixels_NYX3), -1).astype(np.float32)[:, :15] / 255
    if dtype == "bfloat16":
        x_ND = np.round(x_ND, 1)
    p_NK = 0.01 + x_ND[:, 10:] ** 4
    return Features(x_ND[:, :6], x_ND[:, 6:10], p_NK / p_NK.sum(1, keepdims=True))


def install(monkeypatch) -> None:
    """Let `evaluate` compute features by this network."""
    monkeypatch.setattr(scoring, "FeatureExtractor", NarrowExtractor)
    monkeypatch.setattr(feature_folder, "WIDTHS", WIDTHS)
    monkeypatch.setattr(feature_folder, "PART_IMAGES", 16)
    monkeypatch.setattr(scoring, "PART_IMAGES", 16)
    for module in (scoring, reference):
        monkeypatch.setattr(module, "POOL_WIDTH", WIDTHS.pool)
    monkeypatch.setattr(reference, "SPATIAL_WIDTH", WIDTHS.spatial)
    weights = NetworkWeights("narrow", {}, {"narrow.pth": "12ab"}, True)
    monkeypatch.setattr(inception_weights, "load_inception", lambda path: weights)
    monkeypatch.setattr(NarrowExtractor, "num_seen", 0)
