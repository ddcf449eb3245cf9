import jax.numpy as jnp
import numpy as np
import pytest
import small_case
from golden_case import quick_jit

from mvar_jax.models.networks import Networks
from mvar_jax.ops.losses import sum_per_scale, token_cross_entropy
from mvar_jax.ops.random import keys_of_samples
from mvar_jax.sampling.analysis import mix_classes, sample_swept, score_classes, teacher_forced_logits
from mvar_jax.sampling.sampler import SampleOptions, guided_logits, sample_pyramid

TOKENIZER, MODEL = small_case.TINY_MODULES["tokenizer"], small_case.TINY_MODULES["transformer"]
PARAMS = small_case.seeded_params(MODEL)
TOKENIZER_PARAMS = small_case.seeded_params(TOKENIZER, std=1.0)
LABELS = np.array([0, 2])
IDS = np.random.default_rng(0).integers(0, 16, (2, MODEL.pyramid.num_tokens))
NETWORKS = Networks(TOKENIZER, TOKENIZER_PARAMS, MODEL, PARAMS)
quick = {
    name: quick_jit(fn.__wrapped__) for name, fn in (("logits", teacher_forced_logits), ("scores", score_classes))
}


@pytest.mark.parametrize(("conditioning", "cfgs"), [("markov", (1.0, 3.0)), ("full", (1.0,))])
def test_a_sweep_draws_what_each_guidance_draws_alone(conditioning, cfgs):
    networks, K = NETWORKS.replace(transformer=MODEL.clone(conditioning=conditioning)), len(cfgs)
    options = SampleOptions(top_k=12)

    @quick_jit
    def run():
        keys, labels = keys_of_samples(0, np.arange(2)), jnp.asarray(LABELS)
        swept_keys = keys_of_samples(0, np.tile(np.arange(2), K))
        cfg_B = jnp.repeat(jnp.asarray(cfgs), 2)
        swept, _ = sample_swept.__wrapped__(networks, jnp.tile(labels, K), cfg_B, swept_keys, options)
        alone = []
        for cfg in cfgs:
            logits_fn = guided_logits(networks, labels, cfg)
            alone.append(sample_pyramid(logits_fn, networks, keys, options)[0])
        return swept.reshape(K, 2, -1), jnp.stack(alone)

    swept, alone = run()
    np.testing.assert_array_equal(swept, alone)
    assert K == 1 or (swept[0] != swept[1]).any()


def test_mixed_classes_are_what_their_weights_say():
    """Row m of the new class table is weights[m] @ table, "no class" is unchanged, and a one-hot row is that class.

    The logits show that the mixed table is used as a class table: a shifted or transposed one changes them.
    """
    weights = jnp.array([[0, 0, 1.0], [0.25, 0.75, 0], [1, 0, 0], [0, 1, 0]])
    mixed = mix_classes(NETWORKS, weights)
    params = mixed.params
    assert mixed.transformer.num_classes == 4 and params["class_embed"].shape == (5, MODEL.width)
    old, new = PARAMS["class_embed"], params["class_embed"]
    np.testing.assert_allclose(new[1], 0.25 * old[0] + 0.75 * old[1], atol=1e-6)
    np.testing.assert_array_equal(new[-1], old[-1])  # no class
    theirs = quick["logits"](mixed, IDS, jnp.array([2, 0]))
    np.testing.assert_allclose(theirs, quick["logits"](NETWORKS, IDS, jnp.array([0, 2])), atol=1e-5)


def test_scores_of_classes_are_those_of_the_logits():
    nats_BCS = quick["scores"](NETWORKS, IDS, jnp.array([2, 0, 1]))
    assert nats_BCS.shape == (2, 3, 2)
    for place, label in enumerate((2, 0, 1)):
        logits = quick["logits"](NETWORKS, IDS, jnp.full(2, label))
        expected = sum_per_scale(token_cross_entropy(logits, jnp.asarray(IDS)), MODEL.pyramid.areas)
        np.testing.assert_allclose(nats_BCS[:, place], expected, rtol=1e-5)
