"""Teacher-forced passes of a transformer and of the refiner that it may have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mvar_jax.models.networks import Networks
from mvar_jax.models.transformer import head_logits, previous_of
from mvar_jax.scales import Phase, Pyramid


def phase_hidden(networks: Networks, previous_BMc: jax.Array, labels_B: jax.Array, phase: Phase) -> jax.Array:
    """Return the transformer's hidden states of a phase's tokens, `[B, N, D] float32`, which a refiner takes.

    previous_BMc: the teacher-forcing input of all scales.
    """
    model = networks.transformer
    previous = previous_of(previous_BMc, phase, model.pyramid.areas[0])
    return model.apply({"params": networks.params}, previous, labels_B, phase, returns_hidden=True)[0]


def phase_logits(
    networks: Networks, previous_BMc: jax.Array, ids_BL: jax.Array, labels_B: jax.Array, phase: Phase
) -> jax.Array:
    """Return the logits of a phase's tokens, `[B, N, V] float32`, given the true ids of the coarser scales.

    In a refined scale also given those of the earlier tokens that the refiner sees. previous_BMc: as above.
    """
    model = networks.transformer
    refined = networks.refined_scales(phase)
    if not refined:
        previous = previous_of(previous_BMc, phase, model.pyramid.areas[0])
        return model.apply({"params": networks.params}, previous, labels_B, phase)[0]
    hidden_BND = phase_hidden(networks, previous_BMc, labels_B, phase)
    logits = refined_logits(networks, networks.refiner_params, hidden_BND, ids_BL, phase)
    places = places_of(model.pyramid, phase, refined)
    rest = np.setdiff1d(np.arange(phase.num_tokens), places)
    if not len(rest):
        return logits
    others = head_logits(model, networks.params, hidden_BND[:, rest])
    return jnp.concatenate([logits, others], axis=1)[:, np.argsort(np.concatenate([places, rest]))]


def refined_logits(networks: Networks, params: Any, hidden_BND: jax.Array, ids_BL: jax.Array, phase: Phase):
    """Return the logits of the tokens of a phase's refined scales alone, `[B, n, V] float32`.

    params: of the refiner; the other weights are those of the networks.
    """
    scales = networks.refined_scales(phase)
    places = places_of(networks.transformer.pyramid, phase, scales)
    ids_BN, codebook = ids_BL[:, phase.begin : phase.end], networks.tokenizer_params["codebook"]
    arguments = hidden_BND[:, places], ids_BN[:, places], codebook, scales
    return networks.refiner.apply({"params": params}, *arguments, method="teacher_forced")


def places_of(pyramid: Pyramid, phase: Phase, scales: tuple[int, ...]) -> np.ndarray:
    """Return the places of the tokens of some scales among those of a phase."""
    offsets = pyramid.offsets
    return np.concatenate([np.arange(offsets[scale], offsets[scale + 1]) for scale in scales]) - phase.begin
