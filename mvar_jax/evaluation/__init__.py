"""Scores of images: FID, sFID, inception score, precision, recall, LPIPS, and reconstructions with theirs.

The functions are imported on first use, so that importing the package costs nothing.
"""

import importlib

_PUBLIC = {
    "frechet_distance": "statistics",
    "inception_features": "features",
    "inception_score": "class_score",
    "lpips_distance": "lpips",
    "precision_recall": "manifolds",
}


def __getattr__(name: str):
    """Import a public function on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mvar_jax.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mvar_jax.evaluation.{_PUBLIC[name]}"), name)
