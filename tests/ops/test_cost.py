import pytest
from small_case import MODEL, count, shapes_of

from mvar_jax.ops.cost import attention_macs, forward_macs, keys_seen, kv_cache_bytes
from mvar_jax.scales import KNOWN_SIDES, Pyramid

MVAR_256 = Pyramid(KNOWN_SIDES[256], refine_step=8, kernel_size=7)
SCALE_MARKOV_256 = Pyramid(KNOWN_SIDES[256], refine_step=10)


@pytest.mark.parametrize(
    ("depth", "pyramid", "conditioning", "published"),
    [
        (16, MVAR_256, "full", 43.61),
        (16, SCALE_MARKOV_256, "markov", 37.845),
        (16, MVAR_256, "markov", 35.44),
        (20, MVAR_256, "full", 81.51),  # printed 81.52
        (20, MVAR_256, "markov", 68.75),
        (24, MVAR_256, "full", 136.63),
        (24, MVAR_256, "markov", 118.25),
    ],
)
def test_attention_macs_equal_the_published_figures(depth, pyramid, conditioning, published):
    macs = attention_macs(pyramid, depth, 64 * depth, conditioning) / 1e9
    assert macs == pytest.approx(published, abs=0.0051)


@pytest.mark.parametrize(("depth", "published_mib"), [(16, 5440), (20, 8500), (24, 12240)])
def test_cache_of_a_guided_batch_of_32_equals_the_published_figures(depth, published_mib):
    assert kv_cache_bytes(MVAR_256, depth, 64 * depth, 64, "full") == published_mib * 2**20
    assert kv_cache_bytes(MVAR_256, depth, 64 * depth, 64, "markov") == 0


def test_keys_seen_are_counted_token_by_token():
    pyramid = Pyramid((1, 2, 4, 5), refine_step=2, kernel_size=(3, 7))
    assert keys_seen(pyramid, "markov") == 1 * 1 + 4 * 4 + 16 * 9 + 25 * 25  # a window of 7 is cut to the map
    assert keys_seen(pyramid, "full") == 1 * 1 + 4 * 5 + 16 * 21 + 25 * 46


def test_forward_macs_count_every_matrix_once_a_token():
    pyramid = MODEL.pyramid
    macs = forward_macs(pyramid, MODEL.depth, MODEL.width, MODEL.vocab_size, MODEL.code_width)
    params = shapes_of(MODEL)
    a_token = sum(count(params[name]["kernel"]) for name in ("head", "word_embed")) + sum(
        count(params["blocks"][part][name]) for part, name in (("attention", "qkv"),)
    )
    a_token += count(params["blocks"]["attention"]["proj"]["kernel"])
    a_token += sum(count(params["blocks"]["ffn"][name]["kernel"]) for name in ("up", "down"))
    an_image = count(params["blocks"]["adaptive"]["kernel"]) + count(params["head_adaptive"]["kernel"])
    scores = MODEL.depth * 2 * MODEL.width * keys_seen(pyramid, "markov")
    assert macs == a_token * pyramid.num_tokens + an_image + scores
