"""The Python API on a small model: editing and analysis."""

import numpy as np
import pytest
import small_case

from mvar_jax.api import Model
from mvar_jax.checkpoints.class_names import ClassNames
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 16, (3, 10))
MASK = np.zeros((6, 6), bool)
MASK[:, :3] = True


@pytest.fixture(scope="module")
def model(quick_programs):
    networks = Networks.of(small_case.TINY_MODULES, small_case.tiny_params())
    return Model(networks, ClassNames([("ant",), ("bee",), ("cat", "tom cat")]))


def test_an_edit_is_a_function_of_its_index_and_of_the_known_pixels(model):
    """Other pixels under the mask change nothing, known pixels are kept bit for bit, and index, seed, label matter.

    Catches masked pixels that reach the encoder, and keys that depend on the position in the batch.
    """
    under = np.where(MASK[..., None], -IMAGES, IMAGES)
    images, ids = model.edit(IMAGES, MASK, ["bee", 2], cfg=1.0)
    others, other_ids = model.edit(under, MASK, [1, 2], cfg=1.0)
    np.testing.assert_array_equal(images, others)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_array_equal(images[:, ~MASK], IMAGES[:, ~MASK])
    swapped, _ = model.edit(IMAGES[::-1], MASK, [2, 1], cfg=1.0, index=[1, 0])
    np.testing.assert_allclose(swapped[::-1], images, atol=1e-5)
    for different in (model.edit(IMAGES, MASK, [1, 2], cfg=1.0, seed=1), model.edit(IMAGES, MASK, [0, 0], cfg=1.0)):
        assert (np.asarray(different[1]) != ids).any()


def test_one_image_serves_several_labels(model):
    images, _ = model.edit(IMAGES[:1], MASK, [1, 2], cfg=1.0)
    assert images.shape == (2, 6, 6, 3)
    np.testing.assert_array_equal(images[:, ~MASK], IMAGES[[0, 0]][:, ~MASK])
    with pytest.raises(
        InputError, match="numbers of images and masks must each be 1 or 3 .*, got 2 and 1$"
    ) as caught:
        model.edit(IMAGES, MASK, [0, 1, 2])
    assert caught.value.field == "images"


def test_progress_ends_with_the_image(model):
    images = model.progress(IDS)
    assert images.shape == (2, 3, 6, 6, 3)
    np.testing.assert_allclose(images[-1], model.decode(IDS), atol=1e-5)
    assert np.abs(images[0] - images[-1]).max() > 0.01


def test_interpolation_goes_from_one_class_to_the_other(model):
    _, ids = model.interpolate("ant", "tom cat", num=3, index=5, cfg=1.0)
    _, ends = model.sample([0, 1, 2], index=[5, 5, 5], cfg=1.0)
    np.testing.assert_array_equal(np.asarray(ids)[[0, 2]], np.asarray(ends)[[0, 2]])
    with pytest.raises(InputError, match=r"^weights must be .* of shape \[M, 3\], got float64 \[2, 4\]"):
        model.mix_classes(np.ones((2, 4)))


def test_a_sweep_has_a_row_for_each_guidance(model):
    images, ids = model.sweep(["ant", "bee"], [1.0, 4.0, 1.0])
    assert images.shape == (3, 2, 6, 6, 3) and ids.shape == (3, 2, 10)
    np.testing.assert_array_equal(ids[0], ids[2])
    assert (ids[0] != ids[1]).any() and (images[0] != images[1]).any()
    with pytest.raises(InputError, match="^cfg must be .*, got -1"):
        model.sweep([0], [1.0, -1.0])
    with pytest.raises(InputError, match="^temperature must be "):
        model.sweep([0], [1.0], temperature=-1.0)


def test_classes_are_ranked_by_bayes_rule_in_padded_batches(model):
    scores = model.score_classes(IDS, batch_size=2)
    likelihood = np.exp(-scores.sum(axis=2, dtype=np.float64))
    probability = model.classify(IDS, batch_size=2)
    np.testing.assert_allclose(probability, likelihood / likelihood.sum(axis=1, keepdims=True), rtol=1e-3)
    turned = model.classify(IDS[::-1], ["cat", "bee", "ant"], batch_size=2)
    np.testing.assert_allclose(turned[::-1, ::-1], probability, rtol=1e-4)


def test_entropy_is_that_of_the_logits_summed_over_each_map(model):
    """And for ids drawn from these distributions it would be the mean of `score`."""
    logits_BLV = np.asarray(model.logits(IDS[:2], [0, 1]), np.float64)
    p = np.exp(logits_BLV) / np.exp(logits_BLV).sum(-1, keepdims=True)
    found, cuts = model.entropy(IDS[:2], [0, 1]), model.transformer.pyramid.offsets
    for scale, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        expected = -(p * np.log(p))[:, begin:end].sum((1, 2))
        np.testing.assert_allclose(found[:, scale], expected, rtol=1e-4)


def test_an_unknown_name_is_refused_with_the_nearest(model):
    with pytest.raises(InputError, match="^labels: unknown class 'bea'. Did you mean bee .1.?"):
        model.sample(["bea"])


def test_ids_of_an_edit_do_not_depend_on_its_batch(model):
    _, ids = model.edit(IMAGES[:1], MASK, [1, 2, 0, 1], cfg=1.0, seed=7)
    _, alone = model.edit(IMAGES[:1], MASK, [0, 1], cfg=1.0, seed=7, index=[2, 3])
    np.testing.assert_array_equal(alone, ids[2:])


def test_an_image_of_any_size_is_edited_around_its_mask(model):
    """The model's square alone and the same pixels inside a larger image give the same ids and pixels."""
    large = np.random.default_rng(3).integers(0, 256, (1, 6, 20, 3), np.uint8)
    mask = np.zeros((6, 20), np.uint8)
    mask[1:5, 9:12] = 1
    images, ids = model.edit(large, mask, [1, 2], cfg=1.0)
    inside, inside_ids = model.edit(large[:, :, 7:13], mask[:, 7:13], [1, 2], cfg=1.0)
    np.testing.assert_array_equal(ids, inside_ids)
    np.testing.assert_array_equal(images[:, :, 7:13], inside)
    np.testing.assert_array_equal(images[:, mask == 0], (large[[0, 0]] / np.float32(127.5) - 1)[:, mask == 0])
    cut, _ = model.edit(large, 1 - mask, [1, 2], cfg=1.0, invert=True)
    np.testing.assert_array_equal(cut, images)
