"""MVAR in JAX: visual autoregressive modelling with scale- and spatial-Markov conditioning (arXiv 2505.12742).

Arrays carry their axes in the name: B batch, S scales, L pyramid tokens, N or n tokens of one pass or scale,
H heads, K head width, D model width, c codebook width, V codes, W window side, Y/X rows and columns. Images
are NHWC float32 in [-1, 1]; ids are int32, coarse to fine, row-major in each map.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Import `load` or `local_window_attention` on first use, so that the command line starts fast."""
    if name == "load":
        from mvar_jax.api import load

        return load
    if name == "local_window_attention":
        from mvar_jax.ops.window import local_window_attention

        return local_window_attention
    raise AttributeError(f"module 'mvar_jax' has no attribute {name!r}")
