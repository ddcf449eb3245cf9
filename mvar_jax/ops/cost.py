"""What a model costs, by arithmetic: multiply-accumulates and the bytes of VAR's cache (MVAR tables 1 and 5)."""

from mvar_jax.scales import BLOCK_CAUSAL, Phase, Pyramid


def keys_seen(pyramid: Pyramid, conditioning: str) -> int:
    """Sum over all tokens of the keys that each one attends to."""
    areas = pyramid.areas
    if conditioning == "full":
        return sum(area * end for area, end in zip(areas, pyramid.offsets[1:], strict=True))
    windows = [pyramid.window(scale) or side for scale, side in enumerate(pyramid.sides)]
    return sum(area * min(window**2, area) for area, window in zip(areas, windows, strict=True))


def attention_macs(pyramid: Pyramid, depth: int, width: int, conditioning: str = "markov") -> int:
    """Multiply-accumulates of q, k, v projection, q k and a v, one image through all scales.

    This is what the paper prints as GFLOPs.
    """
    return depth * (3 * width**2 * pyramid.num_tokens + 2 * width * keys_seen(pyramid, conditioning))


def forward_macs(
    pyramid: Pyramid, depth: int, width: int, vocab_size: int, code_width: int, conditioning: str = "markov"
) -> int:
    """Multiply-accumulates of the whole transformer, one image through all scales; norms and biases are free.

    Beyond attention: its output projection, the 4x feed-forward, embedding and head of every token; the
    adaptive vectors (6 a layer, 2 before the head) of every image.
    """
    a_token = depth * (width**2 + 2 * 4 * width**2) + width * (code_width + vocab_size)
    an_image = (6 * depth + 2) * width**2
    return attention_macs(pyramid, depth, width, conditioning) + a_token * pyramid.num_tokens + an_image


def kv_cache_bytes(
    pyramid: Pyramid, depth: int, width: int, num_rows: int, conditioning: str = "markov", item_bytes: int = 4
) -> int:
    """Keys and values that sampling keeps: none in the Markov view. num_rows: samples, twice that with guidance."""
    if conditioning != "full":
        return 0
    return 2 * depth * num_rows * pyramid.num_tokens * width * item_bytes


def phase_macs(pyramid: Pyramid, phase: Phase, depth: int, width: int, vocab_size: int, code_width: int) -> int:
    """Multiply-accumulates of one pass over the tokens of a phase, one image, forward alone."""
    keys = 0
    for scale in range(phase.first, phase.last + 1):
        area, window = pyramid.areas[scale], pyramid.window(scale) or pyramid.sides[scale]
        seen = pyramid.offsets[scale + 1] if phase.attention == BLOCK_CAUSAL else min(window**2, area)
        keys += area * seen
    a_token = depth * 12 * width**2 + width * (code_width + vocab_size)
    an_image = (6 * depth + 2) * width**2
    return a_token * phase.num_tokens + depth * 2 * width * keys + an_image
