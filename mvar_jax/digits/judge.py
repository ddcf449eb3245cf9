"""Judges of digit images: a classifier and feature spaces, fitted on real training images only.

Everything looks at images through the 8 x 8 grid of the original data set, so that up-sampling plays no part.
Fits are deterministic: fixed seeds, no held-out image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mvar_jax.errors import InputError

GRID_SIDE = 8
NUM_HIDDEN = 64  # width of the classifier whose hidden layer is the feature space
NUM_COMPONENTS = 32


def to_unit(images_BYX3) -> np.ndarray:
    """uint8 images, or float images in [-1, 1], as float64 in [0, 1]. Raises InputError for other values."""
    images_BYX3 = np.asarray(images_BYX3)
    if images_BYX3.ndim != 4 or len(images_BYX3) == 0:
        raise InputError("images", images_BYX3.shape, "[B, Y, X, 3] with at least one image")
    if images_BYX3.dtype == np.uint8:
        return images_BYX3 / 255.0
    images_BYX3 = images_BYX3.astype(np.float64)
    low, high = images_BYX3.min(), images_BYX3.max()
    if not (low >= -1.001 and high <= 1.001):
        raise InputError("images", f"values {low:.4g} to {high:.4g}", "uint8, or floats in [-1, 1]")
    return np.clip((images_BYX3 + 1) / 2, 0, 1)


def reduce_to_grid(images_BYX3) -> np.ndarray:
    """Grey values [B, 64] in [0, 1]: mean of the channels, box average to 8 x 8, row by row.

    Takes what `to_unit` takes. Raises InputError unless the sides are multiples of 8.
    """
    grey_BYX = to_unit(images_BYX3).mean(3)
    batch, height, width = grey_BYX.shape
    if height % GRID_SIDE or width % GRID_SIDE:
        raise InputError("images", f"{height} x {width} pixels", f"sides that are multiples of {GRID_SIDE}")
    boxes = grey_BYX.reshape(batch, GRID_SIDE, height // GRID_SIDE, GRID_SIDE, width // GRID_SIDE)
    return boxes.mean((2, 4)).reshape(batch, GRID_SIDE**2)


def train_judge(grid_NG: np.ndarray, labels_N: np.ndarray):
    """A support-vector classifier (scikit-learn `SVC`, C = 10) of the output of `reduce_to_grid`."""
    from sklearn.svm import SVC

    return SVC(C=10).fit(grid_NG, labels_N)


def class_accuracy(judge, images_BYX3, labels_B) -> float:
    """Share of images in which the judge recognises the label."""
    return float(np.mean(judge.predict(reduce_to_grid(images_BYX3)) == np.asarray(labels_B)))


@dataclass(frozen=True)
class FeatureSpace:
    """An affine map of the 8 x 8 grid, and a relu where `activation` says so: images to features [B, D]."""

    weight_GD: np.ndarray
    bias_D: np.ndarray
    activation: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images_BYX3) -> np.ndarray:
        return self.activation(reduce_to_grid(images_BYX3) @ self.weight_GD + self.bias_D)


def hidden_layer_space(grid_NG: np.ndarray, labels_N: np.ndarray) -> FeatureSpace:
    """The 64 relu units of a one-layer classifier trained on the grids of real training images."""
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier((NUM_HIDDEN,), random_state=0, max_iter=1000).fit(grid_NG, labels_N)
    return FeatureSpace(classifier.coefs_[0], classifier.intercepts_[0], lambda x: np.maximum(x, 0))


def principal_space(grid_NG: np.ndarray) -> FeatureSpace:
    """The first 32 principal components of the grids of real training images."""
    from sklearn.decomposition import PCA

    components = PCA(NUM_COMPONENTS, svd_solver="full").fit(grid_NG)
    weight_GD = components.components_.T
    return FeatureSpace(weight_GD, -components.mean_ @ weight_GD, lambda x: x)
