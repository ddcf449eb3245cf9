"""What users give to a model: numbers of any library, images, ids and indices; all else is refused with its field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_case

from mvar_jax.api import Model
from mvar_jax.checkpoints.class_names import ClassNames
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.ops.pixels import as_images
from mvar_jax.sampling.inputs import check_cfgs, check_ids, check_images, check_index
from mvar_jax.sampling.order import Order
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.values import as_seed

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
LEVELS = np.random.default_rng(1).integers(0, 256, (2, 6, 6, 3), np.uint8)
IDS = np.random.default_rng(2).integers(0, 16, (3, 10))
MASK = np.tri(6, dtype=bool)


@pytest.fixture(scope="module")
def model():
    """Nothing is compiled with it: every call here is refused before."""
    networks = Networks.of(small_case.TINY_MODULES, small_case.tiny_params())
    return Model(networks, ClassNames([("ant",), ("bee",), ("cat",)]))


def test_levels_become_the_images_that_training_sees():
    np.testing.assert_array_equal(check_images(LEVELS, 6), jax.jit(as_images)(LEVELS))
    np.testing.assert_array_equal(check_images(jnp.asarray(LEVELS), 6), jax.jit(as_images)(LEVELS))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_float_images_up_to_rounding_are_taken_as_they_are(kind):
    images = IMAGES.astype(kind)
    images[0, 0, 0] = [-1, 1, 1]
    np.testing.assert_array_equal(check_images(images, 6), images.astype(np.float32))
    over = np.full_like(IMAGES, np.nextafter(np.float32(1), 2))
    np.testing.assert_array_equal(check_images(over, 6), over)


def test_numbers_of_any_library_are_the_same_options():
    expected = SampleOptions(2.5, 3, 0.5, True, 2.0)
    for of in (np.float32, np.float64, jnp.float32, jnp.bfloat16, np.array):
        options = SampleOptions(of(2.5), 3, of(0.5), True, of(2.0))
        assert options == expected and hash(options) == hash(expected)
    for of in (np.int8, np.uint64, jnp.int32, np.array):
        assert SampleOptions(2.5, of(3), 0.5, np.True_, of(2)) == expected
        assert as_seed(of(7)) == 7 and type(as_seed(of(7))) is int
    assert [type(x) for x in (options.cfg, options.top_k, options.smooth)] == [float, int, bool]


def test_the_highest_seeds_and_indices_are_taken():
    assert as_seed(2**32 - 1) == 2**32 - 1
    np.testing.assert_array_equal(check_index([2**32 - 1, 0], 2), np.array([2**32 - 1, 0], np.uint32))
    np.testing.assert_array_equal(check_index(None, 3), [0, 1, 2])
    np.testing.assert_array_equal(check_ids(IDS.astype(np.uint8), small_case.TINY_MODULES["tokenizer"]), IDS)
    np.testing.assert_array_equal(check_cfgs(jnp.arange(3)), [0, 1, 2])


REFUSED = {
    "images": [
        (
            lambda m: m.encode(IMAGES + 1.01),
            "finite and from -1 to 1, got .* to 2.0.*; pass levels 0 to 255 as uint8",
        ),
        (lambda m: m.encode(IMAGES * np.nan), "finite .* got nan to nan"),
        (lambda m: m.encode(np.full((1, 6, 6, 3), 1e39)), "finite .* got inf to inf"),
        (lambda m: m.encode(LEVELS.astype(np.float32)), "from -1 to 1, got 0 to 25"),
        (lambda m: m.edit(LEVELS.astype(np.float64), MASK, [1, 1]), "from -1 to 1"),
        (lambda m: m.encode(LEVELS.astype(int)), r"uint8, or float in \[-1, 1\], got int64"),
        (lambda m: m.encode(IMAGES > 0), "uint8, or float .*, got bool"),
        (lambda m: m.encode(LEVELS[0]), r"an array \[B, 6, 6, 3\] with B of 1 or more, got uint8 \[6, 6, 3\]"),
        (lambda m: m.encode(LEVELS[..., :1]), r"got uint8 \[2, 6, 6, 1\]"),
        (lambda m: m.encode(LEVELS[:0]), r"B of 1 or more, got uint8 \[0, 6, 6, 3\]"),
        (lambda m: m.edit(IMAGES[:0], MASK, [1]), "B of 1 or more"),
        (lambda m: m.encode("photo.png"), r"an array \[B, 6, 6, 3\]"),
        (lambda m: m.encode([[1.0], [1.0, 2.0]]), r"an array \[B, 6, 6, 3\]"),
    ],
    "seed": [
        (lambda m: m.sample([1], seed=-1), r"from 0 to 2\*\*32 - 1, got -1$"),
        (lambda m: m.sample([1], seed=2**32 + 5), "got 4294967301$"),
        (lambda m: m.sweep([1], [1.0], seed=2**70), "got 1180591620717411303424$"),
        (lambda m: m.edit(IMAGES, MASK, [1, 1], seed=1.0), "a whole number, .* got 1.0$"),
        (lambda m: m.sample([1], seed="1"), "got '1'$"),
        (lambda m: m.sample([1], seed=True), "got True$"),
        (lambda m: m.sample([1], seed=np.array([1])), r"got array\(\[1\]\)$"),
        (lambda m: Order((1,), 1, SampleOptions(), seed=-1), "got -1$"),
    ],
    "index": [
        (
            lambda m: m.sample([1, 2], index=5),
            r"integers \[2\] from 0 to 2\*\*32 - 1, one for each label, got int64 \[\]",
        ),
        (lambda m: m.sample([1, 2], index=[5]), r"got int64 \[1\]"),
        (lambda m: m.sweep([1], [1.0], index=[1, 2]), r"got int64 \[2\]"),
        (lambda m: m.sample([1], index=[1.5]), "got float64"),
        (lambda m: m.edit(IMAGES, MASK, [1, 1], index=[-1, 0]), "got -1 to 0"),
        (lambda m: m.sample([1], index=[2**32]), "got 4294967296"),
        (lambda m: m.interpolate(0, 1, index=-1), "got -1$"),
    ],
    "cfg": [
        (lambda m: m.sample([1], cfg=np.inf), "from 0 .no guidance. to 1e6, got inf$"),
        (lambda m: m.edit(IMAGES, MASK, [1, 1], cfg=1e39), r"got 1e\+39$"),
        (lambda m: m.sweep([1], [1.0, np.nan]), "got nan$"),
        (lambda m: m.sample([1], cfg="2"), "a number, .* got '2'$"),
        (lambda m: m.sample([1], cfg=np.array([1.0])), "a number"),
        (lambda m: m.sweep([1], ["1"]), "a number"),
    ],
    "cfgs": [(lambda m: m.sweep([1], []), "one or more"), (lambda m: m.sweep([1], 2.0), "got 2.0$")],
    "top_k": [(lambda m: m.sample([1], top_k="5"), "got '5'$"), (lambda m: m.sample([1], top_k=5.0), "got 5.0$")],
    "top_p": [(lambda m: m.sweep([1], [1.0], top_p=np.nan), "got nan$")],
    "temperature": [
        (lambda m: m.sample([1], temperature=1e-50), "from 1e-6 to 1e6 .* got 1e-50$"),
        (lambda m: m.sweep([1], [1.0], temperature=np.inf), "got inf$"),
        (lambda m: m.sample([1], temperature=[1, [2]]), r"a number, .* got \[2\]$"),
        (lambda m: m.sample([1], temperature=[]), r"a number, .* got \[\]$"),
    ],
    "smooth": [(lambda m: m.sample([1], smooth="no"), "True or False, got 'no'$")],
    "softness": [(lambda m: m.edit(IMAGES, MASK, [1, 1], softness="0"), "a number, .* got '0'$")],
    "border": [(lambda m: m.edit(IMAGES, MASK, [1, 1], border_px=np.nan), "got nan$")],
    "labels": [
        (lambda m: m.sample([]), "a list of class numbers or class names, got"),
        (lambda m: m.sample(1), "got 1$"),
        (lambda m: m.sample([1.0]), "got .1.0.$"),
        (lambda m: m.sample([[1], [1, 2]]), "got ..1., .1, 2..$"),
        (lambda m: m.sample([2**40]), "from 0 to 2, got 1099511627776$"),
        (lambda m: m.logits(IDS, [1]), "3, one for each row of ids, got 1$"),
        (lambda m: m.score(IDS, [1, 2]), "3, one for each row of ids, got 2$"),
        (lambda m: m.classify(IDS, []), "a list of class numbers"),
    ],
    "ids": [
        (lambda m: m.decode(IDS * 1.0), r"integers \[B, 10\] with B of 1 or more, got float64 \[3, 10\]"),
        (lambda m: m.decode(IDS[:, :4]), r"got int64 \[3, 4\]"),
        (lambda m: m.progress(IDS[0]), r"got int64 \[10\]"),
        (lambda m: m.classify(IDS[:0]), r"got int64 \[0, 10\]"),
        (lambda m: m.score(IDS + 16, [0, 1, 2]), "from 0 to 15, got 16 to 31$"),
        (lambda m: m.decode(IDS + 2**40), "from 0 to 15, got 1099511627776"),
        (lambda m: m.decode([[1], [1, 2]]), "integers"),
    ],
    "f_hat": [
        (lambda m: m.decode_features(np.zeros((1, 4, 4, 4))), r"float \[B, 3, 3, 4\] .* got float64 \[1, 4, 4, 4\]"),
        (lambda m: m.decode_features(jnp.zeros((0, 3, 3, 4))), r"got float32 \[0, 3, 3, 4\]"),
        (lambda m: m.decode_features(np.full((1, 3, 3, 4), np.nan)), "finite numbers, got NaN or infinity$"),
    ],
    "batch_size": [
        (lambda m: m.classify(IDS, batch_size=0), "1 or more, got 0$"),
        (lambda m: m.score_classes(IDS, batch_size="3"), "a whole number, 1 or more, got '3'$"),
        (lambda m: Order((1,), 1, SampleOptions(), batch_size=0), "got 0$"),
    ],
    "num": [
        (lambda m: m.interpolate(0, 1, num=0), "got 0$"),
        (lambda m: m.interpolate(0, 1, num=10**22), r"from 1 to 2\*\*32 - 1, got 10{22}$"),
        (lambda m: Order((1,), 0, SampleOptions()), "got 0$"),
        (lambda m: Order((0, 1, 2, 3), 2**30, SampleOptions()), "from 1 to 1073741823, got 1073741824$"),
    ],
    "invert": [
        (lambda m: m.edit(IMAGES, MASK, [1, 1], invert=None), "True or False, got None$"),
        (lambda m: m.edit(IMAGES, MASK, [1, 1], invert="no"), "True or False, got 'no'$"),
        (lambda m: m.edit(IMAGES, MASK, [1, 1], invert=np.array([True, False])), "True or False, got array"),
    ],
    "sides": [
        (lambda m: m.for_images(6, 6, 3), "a list of whole numbers of 0 or more, got 3$"),
        (lambda m: m.for_images(6, 6, "1,3"), "a list of whole numbers .* got '1,3'$"),
        (lambda m: m.for_images(6, 6, [1, 2.5, 3]), "a whole number, 0 or more, got 2.5$"),
    ],
    "first": [(lambda m: m.interpolate("0-2", 1), "one class each, got '0-2' and 1$")],
    "weights": [
        (lambda m: m.mix_classes([["1", "0", "0"]]), "real numbers"),
        (lambda m: m.mix_classes([[1j, 0, 0]]), r"real numbers of shape \[M, 3\], got complex128 \[1, 3\]$"),
        (lambda m: m.mix_classes([[True, False, False]]), "real numbers .* got bool"),
        (lambda m: m.mix_classes([[np.nan, 0, 0]]), "finite numbers that float32 can hold, got"),
        (lambda m: m.mix_classes([[1e300, 0, 0]]), "finite numbers that float32 can hold, got"),
        (lambda m: m.mix_classes(np.zeros((0, 3))), r"got float64 \[0, 3\]$"),
    ],
}


@pytest.mark.parametrize(
    ("field", "call", "words"),
    [(field, call, words) for field, rows in REFUSED.items() for call, words in rows],
)
def test_a_value_that_a_model_cannot_use_is_refused(model, field, call, words):
    with pytest.raises(InputError, match=words) as refusal:
        call(model)
    assert refusal.value.field == field
    assert str(refusal.value).startswith(field) or field == "first"
    assert "\n" not in str(refusal.value)
