"""The draw kernel, interpreted, against filters, draw and weights of ops/sampling.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import load, quick_jit

from mvar_jax.ops.draw_gpu import MAX_CODES, Kernel, draw_filtered, gumbel_row, why_not
from mvar_jax.ops.platform import compiling_for
from mvar_jax.ops.sampling import draw, filter_logits, gumbel_noise, smooth_weights
from mvar_jax.sampling.sampler import SampleOptions, draw_scale
from mvar_jax.sharding import make_mesh, use_mesh

GOLDEN = load("topk_topp")
KEYS = jax.random.split(jax.random.key(3), 3)
SCALE = (3, 10)


@functools.partial(quick_jit, static_argnums=0)
def by_xla(kernel: Kernel, logits, keys_B):
    if kernel.temperature != 1:
        logits = logits / kernel.temperature
    filtered = filter_logits(logits, kernel.top_k, kernel.top_p)
    return draw(filtered, keys_B), smooth_weights(filtered, gumbel_noise(filtered, keys_B), *SCALE)


def tied_logits() -> np.ndarray:
    """Rows of 100 codes, which no power of two is: a third with many ties, a third all equal but one."""
    logits = np.random.default_rng(0).normal(size=(3, 7, 100)).astype(np.float32) * 3
    logits[0] = np.round(logits[0])
    logits[1] = np.where(np.arange(100) == 5, 1, 0)
    return logits


@pytest.mark.parametrize(
    ("logits", "kernel"),
    [
        (GOLDEN["logits"], Kernel(20, 0.9, smooth=SCALE)),
        (GOLDEN["logits_ties"], Kernel(40, 0.96)),
        (tied_logits(), Kernel(30, 0.5, temperature=0.7, smooth=SCALE)),
    ],
)
def test_the_kernel_draws_the_ids_and_weights_that_xla_draws(logits, kernel):
    """In a mesh too, of which each device would draw its own samples."""
    ids, weights = by_xla(kernel, logits, KEYS)
    run = quick_jit(functools.partial(draw_filtered, Kernel(**{**vars(kernel), "interpret": True})))
    with use_mesh(make_mesh(devices=jax.devices()[:1])):
        results = run(logits, KEYS)
    np.testing.assert_array_equal(results[0], ids)
    assert len(results) == (1 if kernel.smooth is None else 2)
    if kernel.smooth is not None:
        np.testing.assert_allclose(results[1], weights, atol=2e-6)
        np.testing.assert_array_equal(np.asarray(results[1]) > 0, np.asarray(weights) > 0)


def test_noise_of_a_row_is_that_of_jax_bit_for_bit():
    words = jax.random.key_data(KEYS[1])
    ours = quick_jit(gumbel_row)(words[0], words[1], jnp.arange(200, 300))
    np.testing.assert_array_equal(ours, jax.random.gumbel(KEYS[1], (5, 100), jnp.float32)[2])


def like(num_codes=64, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((3, 2, num_codes), dtype)


@pytest.mark.parametrize(
    ("logits", "keys", "reason"),
    [
        (like(), KEYS, None),
        (like(MAX_CODES), KEYS, None),
        (like(MAX_CODES + 1), KEYS, "codes are more than"),
        (like(dtype=jnp.bfloat16), KEYS, "not float32"),
        (like(), jax.random.split(jax.random.key(0, impl="rbg"), 3), "keys are not of"),
    ],
)
def test_what_the_kernel_cannot_draw_it_refuses_with_the_reason(logits, keys, reason):
    assert "it runs on gpu" in why_not(logits, keys)
    with compiling_for("gpu"):
        given = why_not(logits, keys)
        assert given is None if reason is None else reason in given
        with jax.threefry_partitionable(False):
            assert why_not(logits, keys) is not None


@pytest.mark.parametrize("smooth", [False, True])
def test_the_sampler_draws_by_the_kernel_on_a_gpu_and_with_jaxs_noise_alone(smooth):
    def program(noise, platform):
        draw = lambda logits, codebook: draw_scale(logits, KEYS, codebook, SampleOptions(smooth=smooth), 1, 3, noise)
        with compiling_for(platform):
            return str(jax.make_jaxpr(draw)(like(), jax.ShapeDtypeStruct((64, 4), jnp.float32)))

    other_noise = lambda logits, keys: jnp.zeros_like(logits)
    assert "draw_row" in program(gumbel_noise, "gpu")
    assert not any("draw_row" in program(*case) for case in ((gumbel_noise, "cpu"), (other_noise, "gpu")))
