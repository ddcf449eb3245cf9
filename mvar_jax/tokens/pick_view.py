"""The view of a cached image that a training step sees."""

import dataclasses

import numpy as np

from mvar_jax.tokens.philox import first_draws_below


@dataclasses.dataclass(frozen=True)
class PickView:
    """One of an image's cached views, ids [views, L] -> [L]: a uniform draw, or the first without an rng."""

    def __call__(self, ids: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        return ids[0] if rng is None else ids[rng.integers(len(ids))]

    def pick(self, ids_BvL: np.ndarray, seed: int, index_B: np.ndarray | None) -> np.ndarray:
        """The same for a whole batch at once, each row with the rng of its place in the stream: [B, L]."""
        if index_B is None:
            return ids_BvL[:, 0]
        return ids_BvL[np.arange(len(index_B)), first_draws_below(ids_BvL.shape[1], seed, index_B)]
