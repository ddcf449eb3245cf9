"""Analysis of a model: guidance sweeps, mixed classes, and the likelihood of an image under each class."""

import functools

import jax
import jax.numpy as jnp

from mvar_jax.models.networks import Networks
from mvar_jax.models.refined import phase_logits
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.ops.precision import precision_of
from mvar_jax.sampling.sampler import SampleOptions, guided_logits, sample_pyramid


@functools.partial(jax.jit, static_argnames=("options",))
def sample_swept(networks: Networks, labels_B, cfg_B, keys_B, options: SampleOptions):
    """Run `sample` with one guidance per sample, `[B] float32`, instead of options.cfg."""
    logits_fn = guided_logits(networks, labels_B, cfg_B)
    ids_BL, f_hat, _ = sample_pyramid(logits_fn, networks, keys_B, options)
    return ids_BL, f_hat


def mix_classes(networks: Networks, weights_MC: jax.Array) -> Networks:
    """Return networks whose classes 0 .. M-1 have embeddings weights @ class table; "no class" is unchanged."""
    if networks.later is not None:
        first, later = (mix_classes(part, weights_MC) for part in networks.parts())
        return first.switched(later, networks.switch)
    table = networks.params["class_embed"]
    mixed = jnp.einsum("mc,cd->md", weights_MC, table[:-1], precision=precision_of("mixtures", jnp.float32))
    mixed_table = jnp.concatenate([mixed.astype(table.dtype), table[-1:]])
    transformer = networks.transformer.clone(num_classes=len(weights_MC))
    return networks.replace(transformer=transformer, params={**networks.params, "class_embed": mixed_table})


@jax.jit
def teacher_forced_logits(networks: Networks, ids_BL, labels_B):
    """Return the logits of every scale given the true tokens of the coarser ones, `[B, L, V] float32`.

    In a refined scale also given the true tokens that the refiner draws earlier and sees.
    """
    if networks.later is not None:
        both, begin = networks.parts(), networks.transformer.pyramid.offsets[networks.switch]
        first, later = (teacher_forced_logits(part, ids_BL, labels_B) for part in both)
        return jnp.concatenate([first[:, :begin], later[:, begin:]], axis=1)
    phases = networks.transformer.phases()
    previous = networks.apply_tokenizer(ids_BL, method="teacher_forcing")
    parts = [phase_logits(networks, previous, ids_BL, labels_B, phase) for phase in phases]
    return jnp.concatenate(parts, axis=1)


@jax.jit
def score_classes(networks: Networks, ids_BL, classes_C):
    """Return the negative log-likelihood of each image under each class, in nats per map, `[B, C, S] float32`.

    Computes one class and one phase at a time, so that only the logits of one phase are in memory.
    """
    if networks.later is not None:
        first, later = (score_classes(part, ids_BL, classes_C) for part in networks.parts())
        return jnp.concatenate([first[..., : networks.switch], later[..., networks.switch :]], axis=2)
    previous = networks.apply_tokenizer(ids_BL, method="teacher_forcing")
    model = networks.transformer
    areas = model.pyramid.areas

    def score(label):
        labels_B = jnp.full(ids_BL.shape[:1], label)
        parts = []
        for phase in model.phases():
            logits = phase_logits(networks, previous, ids_BL, labels_B, phase)
            nll_BN = token_cross_entropy(logits, ids_BL[:, phase.begin : phase.end])
            parts.append(sum_per_scale(nll_BN, areas[phase.first : phase.last + 1]))
        return jnp.concatenate(parts, axis=1)

    return jnp.swapaxes(jax.lax.map(score, classes_C), 0, 1)
