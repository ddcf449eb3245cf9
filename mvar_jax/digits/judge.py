"""Judges of digit images: a classifier and feature spaces, fitted on real training images only.

All reduce images to the 8 x 8 grid of the original data set, so that upsampling has no effect. Fits are deterministic
and use no held-out image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mvar_jax.errors import InputError

GRID_SIDE = 8
NUM_HIDDEN = 64  # width of the hidden layer that is the feature space
NUM_COMPONENTS = 32


def to_unit(images_BYX3) -> np.ndarray:
    """Convert uint8 images, or float images in [-1, 1], to float64 in [0, 1]. Raises InputError for other values."""
    images_BYX3 = np.asarray(images_BYX3)
    if images_BYX3.ndim != 4 or len(images_BYX3) == 0:
        given, expected = list(images_BYX3.shape), "[B, Y, X, 3] with at least one image"
        message = f"images must have shape {expected}, got {given}"
        raise InputError(message, field="images", given=given, expected=expected)
    if images_BYX3.dtype == np.uint8:
        return images_BYX3 / 255.0
    images_BYX3 = images_BYX3.astype(np.float64)
    low, high = images_BYX3.min(), images_BYX3.max()
    if not (low >= -1.001 and high <= 1.001):
        given, expected = f"{low:.4g} to {high:.4g}", "uint8, or floats in [-1, 1]"
        message = f"images must be {expected}, got values {given}"
        raise InputError(message, field="images", given=given, expected=expected)
    return np.clip((images_BYX3 + 1) / 2, 0, 1)


def reduce_to_grid(images_BYX3) -> np.ndarray:
    """Return grey values in [0, 1], averaged over channels and boxes to 8 x 8, row by row: `[B, 64] float64`.

    Accepts the images of `to_unit`. Raises InputError unless the sides are multiples of 8.
    """
    grey_BYX = to_unit(images_BYX3)[..., :3].mean(3)
    batch, height, width = grey_BYX.shape
    if height % GRID_SIDE or width % GRID_SIDE:
        given, expected = f"{height} x {width} pixels", f"multiples of {GRID_SIDE}"
        message = f"sides of images must be {expected}, got {given}"
        raise InputError(message, field="images", given=given, expected=expected)
    boxes = grey_BYX.reshape(batch, GRID_SIDE, height // GRID_SIDE, GRID_SIDE, width // GRID_SIDE)
    return boxes.mean((2, 4)).reshape(batch, GRID_SIDE**2)


def train_judge(grid_NG: np.ndarray, labels_N: np.ndarray):
    """Fit a support-vector classifier (scikit-learn `SVC`, C = 10) to the output of `reduce_to_grid`."""
    from sklearn.svm import SVC

    return SVC(C=10).fit(grid_NG, labels_N)


def class_accuracy(judge, images_BYX3, labels_B) -> float:
    """Return the share of images that the judge assigns to their label."""
    return float(np.mean(judge.predict(reduce_to_grid(images_BYX3)) == np.asarray(labels_B)))


@dataclass(frozen=True)
class FeatureSpace:
    """A map from images to features `[B, D]`: affine on the 8 x 8 grid, then `activation`."""

    weight_GD: np.ndarray
    bias_D: np.ndarray
    activation: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images_BYX3) -> np.ndarray:
        return self.activation(reduce_to_grid(images_BYX3) @ self.weight_GD + self.bias_D)


def hidden_layer_space(grid_NG: np.ndarray, labels_N: np.ndarray) -> FeatureSpace:
    """Return the 64 relu units of a one-layer classifier trained on the grids of real training images."""
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier((NUM_HIDDEN,), random_state=0, max_iter=1000).fit(grid_NG, labels_N)
    return FeatureSpace(classifier.coefs_[0], classifier.intercepts_[0], lambda x: np.maximum(x, 0))


def principal_space(grid_NG: np.ndarray) -> FeatureSpace:
    """Return the first 32 principal components of the grids of real training images."""
    from sklearn.decomposition import PCA

    components = PCA(NUM_COMPONENTS, svd_solver="full").fit(grid_NG)
    weight_GD = components.components_.T
    return FeatureSpace(weight_GD, -components.mean_ @ weight_GD, lambda x: x)
