"""Analytic cost of a model: multiply-accumulates and the bytes of VAR's KV cache (MVAR tables 1 and 5)."""

from mvar_jax.scales import BLOCK_CAUSAL, Phase, Pyramid


def keys_seen(pyramid: Pyramid, conditioning: str) -> int:
    """Return the number of query-key pairs: the keys that a token attends to, summed over all tokens."""
    areas = pyramid.areas
    if conditioning == "full":
        return sum(area * end for area, end in zip(areas, pyramid.offsets[1:], strict=True))
    windows = [pyramid.window(scale) or side for scale, side in enumerate(pyramid.sides)]
    return sum(area * min(window**2, area) for area, window in zip(areas, windows, strict=True))


def attention_macs(pyramid: Pyramid, depth: int, width: int, conditioning: str = "markov") -> int:
    """Return the multiply-accumulates of the q, k, v projection, q k^T and a v, for one image and all scales.

    The paper reports this number as GFLOPs.
    """
    return depth * (3 * width**2 * pyramid.num_tokens + 2 * width * keys_seen(pyramid, conditioning))


def forward_macs(
    pyramid: Pyramid, depth: int, width: int, vocab_size: int, code_width: int, conditioning: str = "markov"
) -> int:
    """Return the multiply-accumulates of the transformer for one image and all scales, without norms and biases.

    Added to attention: its output projection, the 4x feed-forward, embedding and head for each token; the
    adaptive vectors (6 per layer, 2 before the head) for each image.
    """
    a_token = depth * (width**2 + 2 * 4 * width**2) + width * (code_width + vocab_size)
    an_image = (6 * depth + 2) * width**2
    return attention_macs(pyramid, depth, width, conditioning) + a_token * pyramid.num_tokens + an_image


def kv_cache_bytes(
    pyramid: Pyramid, depth: int, width: int, num_rows: int, conditioning: str = "markov", item_bytes: int = 4
) -> int:
    """Return the bytes of keys and values that sampling keeps, 0 if "markov".

    num_rows: number of samples, twice that with guidance.
    """
    if conditioning != "full":
        return 0
    return 2 * depth * num_rows * pyramid.num_tokens * width * item_bytes


def phase_macs(pyramid: Pyramid, phase: Phase, depth: int, width: int, vocab_size: int, code_width: int) -> int:
    """Return the multiply-accumulates of one forward pass over the tokens of a phase, for one image."""
    keys = 0
    for scale in range(phase.first, phase.last + 1):
        area, window = pyramid.areas[scale], pyramid.window(scale) or pyramid.sides[scale]
        seen = pyramid.offsets[scale + 1] if phase.attention == BLOCK_CAUSAL else min(window**2, area)
        keys += area * seen
    a_token = depth * 12 * width**2 + width * (code_width + vocab_size)
    an_image = (6 * depth + 2) * width**2
    return a_token * phase.num_tokens + depth * 2 * width * keys + an_image


# products of queries by keys in an attention kernel, by a part of its name: 2 forward; backward they are made again
_KERNEL_PRODUCTS = {"attention_backward": 7, "dkv": 4, "dq": 3, "forward": 2, "fwd": 2, "splash": 2}


def attention_kernel_flops(pyramid: Pyramid, name: str, sides: tuple[int, ...]) -> float:
    """Return the FLOPs of an attention kernel; 0 for an unknown name or operands that are no whole scales.

    Args:
      pyramid: of the transformer, which knows who sees whom.
      name: text that holds the kernel's name.
      sides: of the queries, `[B, N, H, K]`; splash attention's are `[B * H, 1, N, K]`, N rounded up to whole blocks:
        of the scales of that many blocks, the largest is counted.
    """
    num_products = next((num for part, num in _KERNEL_PRODUCTS.items() if part in name), 0)
    num_tokens, num_heads = sides[1], sides[2]
    if "splash" in name:
        (num_heads, N), block = sides[1:3], 128
        num_tokens = max((area for area in pyramid.areas if -(-area // block) * block == N), default=0)
    return 2.0 * num_products * _keys_within(pyramid, num_tokens) * sides[0] * num_heads * sides[3]


def _keys_within(pyramid: Pyramid, num_tokens: int) -> int:
    """Return the query-key pairs of a scale of so many tokens, or of the first scales together; 0 for another."""
    if num_tokens in pyramid.areas:
        window = pyramid.window(pyramid.areas.index(num_tokens))
        return num_tokens * min(window**2 if window else num_tokens, num_tokens)
    if num_tokens in pyramid.offsets[1:]:
        return sum(area**2 for area in pyramid.areas[: pyramid.offsets.index(num_tokens)])
    return 0
